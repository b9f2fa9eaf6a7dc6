// One token of each of some sequences through all blocks of a decoder: RMSNorm, rotary embedding, grouped attention over
// a key-value cache, gated MLP. Products are those of `multiply`; what is between them is in between.h.
#include "interface.h"

namespace {

int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// Parts of a workspace, in floats.
struct Workspace {
  float *normed, *y, *mixed, *weights;

  static int64_t of_normed(const mspc_decoder &d) { return d.batch * d.hidden; }
  static int64_t of_y(const mspc_decoder &d) {
    return d.batch * larger(d.hidden, larger((d.heads + 2 * d.kv_heads) * d.head_dim, 2 * d.intermediate));
  }
  static int64_t of_mixed(const mspc_decoder &d) { return d.batch * larger(d.heads * d.head_dim, d.intermediate); }
  static int64_t of_weights(const mspc_decoder &d) { return d.batch * d.heads * d.length; }

  Workspace(const mspc_decoder &d, float *memory) {
    normed = memory;
    y = normed + of_normed(d);
    mixed = y + of_y(d);
    weights = mixed + of_mixed(d);
  }
};

// The outputs of parts, one after the other: (batch, rows of a part) each.
struct Outcome {
  const mspc_part *parts;
  int64_t count, batch;
  float *y;

  // Row `row` of all rows of a sequence. What begins there lies in one part.
  float *at(int64_t sequence, int64_t row) const {
    float *part = y;
    for (int64_t i = 0; i < count; i++) {
      int64_t rows = parts[i].matrix->rows;
      if (row < rows) return part + sequence * rows + row;
      part += batch * rows;
      row -= rows;
    }
    return part;
  }
};

struct Attention {
  const mspc_decoder &d;
  const mspc_layer &layer;
  const Between &between;
  const Outcome &qkv;
  int64_t first;
  Workspace &work;

  // The heads of queries of one head of keys in one sequence.
  static void run(void *context, int64_t piece) {
    Attention &self = *static_cast<Attention *>(context);
    const mspc_decoder &d = self.d;
    int64_t sequence = piece / d.kv_heads, kv_head = piece % d.kv_heads, of_kv = d.heads / d.kv_heads, dim = d.head_dim;
    float *keys = self.layer.cache + piece * d.length * dim, *values = keys + d.batch * d.kv_heads * d.length * dim;
    self.turned(sequence, d.heads + kv_head, self.layer.k_norm, keys + self.first * dim);
    const float *value = self.qkv.at(sequence, (d.heads + d.kv_heads + kv_head) * dim);
    for (int64_t i = 0; i < dim; i++) values[self.first * dim + i] = value[i];
    float *heads = self.work.mixed + (sequence * d.heads + kv_head * of_kv) * dim;
    float *weights = self.work.weights + (sequence * d.heads + kv_head * of_kv) * d.length;
    for (int64_t i = 0; i < of_kv; i++) self.turned(sequence, kv_head * of_kv + i, self.layer.q_norm, heads + i * dim);
    int64_t seen = self.first + 1, window = self.layer.window, skipped = window && seen > window ? seen - window : 0;
    self.between.attend(heads, of_kv, keys + skipped * dim, values + skipped * dim, seen - skipped, dim, float(d.scale),
                        weights, d.length);
  }

  // A head of queries or keys, with its norm and rotation.
  void turned(int64_t sequence, int64_t head, const float *norm, float *out) const {
    float *from = qkv.at(sequence, head * d.head_dim);
    if (norm) between.norm(from, norm, d.head_dim, float(d.eps), from);
    between.rotate(from, layer.cos + first * d.head_dim, layer.sin + first * d.head_dim, d.head_dim, out);
  }
};

struct Step {
  const mspc_decoder &d;
  const Between &between;
  float *x;  // (batch, hidden)
  int64_t first;
  Workspace work;
  Sharer sharer;

  Outcome product(const float *inputs, const mspc_part *parts, int64_t count) const {
    Factor factors[kMostFactors];
    Outcome outcome{parts, count, d.batch, work.y};
    float *y = work.y;
    for (int64_t i = 0; i < count; y += d.batch * parts[i++].matrix->rows) factors[i] = Factor{parts[i].matrix, y};
    multiply(factors, count, d.isa, inputs, 0, d.batch, d.planes, sharer);
    for (int64_t i = 0; i < count; i++) {
      int64_t rows = parts[i].matrix->rows;
      for (int64_t sequence = 0; sequence < d.batch && parts[i].bias; sequence++)
        between.add(static_cast<float *>(factors[i].y) + sequence * rows, parts[i].bias, 1.0f, rows);
    }
    return outcome;
  }

  // Norms of vectors (batch, hidden); out may be they.
  void norms(const float *vectors, const float *weight, float *out) const {
    for (int64_t sequence = 0; sequence < d.batch; sequence++)
      between.norm(vectors + sequence * d.hidden, weight, d.hidden, float(d.eps), out + sequence * d.hidden);
  }

  void add(float *y, const float *norm) const {
    if (norm) norms(y, norm, y);
    between.add(x, y, float(d.residual), d.batch * d.hidden);
  }

  void block(const mspc_layer &layer) {
    norms(x, layer.attention_norm, work.normed);
    Outcome qkv = product(work.normed, layer.qkv, layer.num_qkv);
    Attention attention{d, layer, between, qkv, first, work};
    sharer.share(sharer, d.batch * d.kv_heads, Attention::run, &attention);
    add(product(work.mixed, &layer.out, 1).y, layer.after_attention);
    norms(x, layer.mlp_norm, work.normed);
    Outcome gate_up = product(work.normed, layer.gate_up, layer.num_gate_up);
    for (int64_t sequence = 0; sequence < d.batch; sequence++)
      between.gate(gate_up.at(sequence, 0), gate_up.at(sequence, d.intermediate), d.intermediate, d.is_gelu,
                   work.mixed + sequence * d.intermediate);
    add(product(work.mixed, &layer.down, 1).y, layer.after_mlp);
  }
};

}  // namespace

extern "C" {

// Floats of the workspace of `mspc_step`.
EXPORTED int64_t mspc_step_floats(const mspc_decoder *d) {
  return Workspace::of_normed(*d) + Workspace::of_y(*d) + Workspace::of_mixed(*d) + Workspace::of_weights(*d);
}

// x (batch, hidden): embeddings of the tokens at position `first` -> what the head reads. Their keys and values go to the
// caches, and they attend to all up to them.
EXPORTED void mspc_step(const mspc_decoder *d, float *x, int64_t first, float *workspace, int64_t threads) {
  const Between &between = kernels_of(d->isa).between;
  Step step{*d, between, x, first, Workspace(*d, workspace), own_threads(&threads)};
  for (int64_t i = 0; i < d->num_layers; i++) step.block(d->layers[i]);
  step.norms(x, d->norm, x);
}
}
