// Choice of the instruction set, threads, and the product as Python calls it.
//
// Threads are those of POSIX and nothing is thrown, so no library of C++ is needed, and any glibc from 2.34 on will do.
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "interface.h"

extern const Kernels portable_kernels;
#ifdef MSPC_X86
extern const Kernels avx2_kernels, avx512_kernels;
#endif
void expand_block(const mspc_matrix &m, int64_t block, float *out);

namespace {

constexpr int64_t kPortable = 0, kAvx2 = 1, kAvx512 = 2;

// Holds a mutex while it lives.
class Held {
 public:
  explicit Held(pthread_mutex_t &mutex) : mutex_(mutex) { pthread_mutex_lock(&mutex_); }
  ~Held() { pthread_mutex_unlock(&mutex_); }
  Held(const Held &) = delete;
  Held &operator=(const Held &) = delete;

 private:
  pthread_mutex_t &mutex_;
};

// Threads that sleep until there is work. Which of them does a piece has no influence on its result.
class Pool {
 public:
  // Call work(context, piece) for every piece, on `threads` threads with the calling one.
  void run(int64_t threads, int64_t pieces, void (*work)(void *, int64_t), void *context) {
    if (threads < 2 || pieces < 2 || pthread_mutex_trylock(&in_use_)) {  // another product has the threads
      for (int64_t piece = 0; piece < pieces; piece++) work(context, piece);
      return;
    }
    int64_t helpers = smaller(threads, pieces) - 1;
    while (started_ < helpers && start()) started_++;
    {
      Held state(state_);
      wanted_ = busy_ = smaller(helpers, started_);
      work_ = work, context_ = context, pieces_ = pieces;
      next_.store(0);
      turn_++;
    }
    pthread_cond_broadcast(&wake_);
    take();
    {
      Held state(state_);
      while (busy_) pthread_cond_wait(&done_, &state_);
    }
    pthread_mutex_unlock(&in_use_);
  }

 private:
  bool start() {
    pthread_t thread;
    if (pthread_create(&thread, nullptr, help, this)) return false;  // the system gives no more
    pthread_detach(thread);
    return true;
  }

  void take() {
    for (int64_t piece; (piece = next_.fetch_add(1)) < pieces_;) work_(context_, piece);
  }

  static void *help(void *pool) {
    Pool &self = *static_cast<Pool *>(pool);
    int64_t number = self.named_.fetch_add(1);
    for (uint64_t seen = 0;;) {
      {
        Held state(self.state_);
        while (self.turn_ == seen || number >= self.wanted_) pthread_cond_wait(&self.wake_, &self.state_);
        seen = self.turn_;
      }
      self.take();
      Held state(self.state_);
      if (--self.busy_ == 0) pthread_cond_signal(&self.done_);
    }
  }

  pthread_mutex_t in_use_ = PTHREAD_MUTEX_INITIALIZER, state_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake_ = PTHREAD_COND_INITIALIZER, done_ = PTHREAD_COND_INITIALIZER;
  std::atomic<int64_t> next_{0}, named_{0};
  int64_t started_ = 0, pieces_ = 0, wanted_ = 0, busy_ = 0;
  uint64_t turn_ = 0;
  void (*work_)(void *, int64_t) = nullptr;
  void *context_ = nullptr;
};

// It is never destroyed, because its threads never end. A process that was forked has none of them, and gets a new one.
std::atomic<Pool *> the_pool{nullptr};
pthread_once_t at_fork = PTHREAD_ONCE_INIT;

// GOMP_parallel of the OpenMP library that torch uses, if it is known: its threads spin for a while after each operation of
// torch, and would hold the cores that other threads need. They do not outlive a fork either.
using Team = void (*)(void (*)(void *), void *, unsigned, unsigned);
std::atomic<Team> the_team{nullptr};

void watch_forks() {
  pthread_once(&at_fork, [] {
    pthread_atfork(nullptr, nullptr, [] {
      the_pool.store(nullptr);
      the_team.store(nullptr);
    });
  });
}

Pool &pool() {
  watch_forks();
  Pool *found = the_pool.load();
  if (found) return *found;
  void *memory = malloc(sizeof(Pool));
  if (!memory) abort();
  Pool *fresh = new (memory) Pool;
  if (the_pool.compare_exchange_strong(found, fresh)) return *fresh;
  free(memory);
  return *found;
}

struct Pieces {
  void (*work)(void *, int64_t);
  void *context;
  int64_t count;
  std::atomic<int64_t> next{0};
};

void take_pieces(void *of) {
  Pieces &pieces = *static_cast<Pieces *>(of);
  for (int64_t piece; (piece = pieces.next.fetch_add(1)) < pieces.count;) pieces.work(pieces.context, piece);
}

// Call work(context, piece) for every piece, on as many threads.
void share(int64_t threads, int64_t count, void (*work)(void *, int64_t), void *context) {
  Team team = the_team.load();
  if (!team || threads < 2 || count < 2) return pool().run(threads, count, work, context);
  Pieces pieces{work, context, count};
  team(take_pieces, &pieces, static_cast<unsigned>(smaller(threads, count)), 0);
}

// Memory of a thread for prepared inputs, which grows. All of it is zero when it is handed out.
struct Scratch {
  char *memory;
  size_t size;

  char *zeroed(size_t bytes) {
    if (bytes > size) {
      free(memory);
      size = (bytes + 4095) / 4096 * 4096;
      memory = static_cast<char *>(aligned_alloc(64, size));
      if (!memory) abort();
    }
    memset(memory, 0, bytes);
    return memory;
  }
};

pthread_once_t at_first_product = PTHREAD_ONCE_INIT;
pthread_key_t scratch_key;

void free_scratches(void *of_thread) {
  for (int64_t i = 0; i < kMostFactors; i++) free(static_cast<Scratch *>(of_thread)[i].memory);
  free(of_thread);
}

// One for the inputs of each factor.
Scratch *scratches_of_thread() {
  pthread_once(&at_first_product, [] {
    if (pthread_key_create(&scratch_key, free_scratches)) abort();
  });
  void *found = pthread_getspecific(scratch_key);
  if (!found) {
    found = calloc(kMostFactors, sizeof(Scratch));
    if (!found) abort();
    pthread_setspecific(scratch_key, found);
  }
  return static_cast<Scratch *>(found);
}

size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

Inputs inputs_in(Scratch &scratch, const mspc_matrix &m, int64_t tokens, int64_t planes) {
  Inputs in{};
  in.tokens = tokens, in.planes = planes, in.stride = num_positions(m) + 64;
  size_t count = size_t(tokens * in.stride), chunks = size_t(tokens * num_chunks(m));
  if (!has_codes(m)) {
    in.x = reinterpret_cast<float *>(scratch.zeroed(4 * count));
    return in;
  }
  char *memory = scratch.zeroed(2 * rounded(count) + 2 * rounded(4 * chunks));
  in.high = reinterpret_cast<int8_t *>(memory);
  in.low = in.high + rounded(count);
  in.integers = reinterpret_cast<const int16_t *>(memory);
  in.scales = reinterpret_cast<const float *>(in.low + rounded(count));
  in.sums = reinterpret_cast<const int32_t *>(reinterpret_cast<const char *>(in.scales) + rounded(4 * chunks));
  return in;
}

// Whether two matrices with the same columns read inputs that are prepared alike.
bool reads_alike(const mspc_matrix &a, const mspc_matrix &b) {
  bool same_order = (a.structure == kTwoFour) == (b.structure == kTwoFour);
  return has_codes(a) == has_codes(b) && (!has_codes(a) || (a.group == b.group && same_order));
}

struct Job {
  const Factor *factors;
  const Kernels &kernels;
  const Inputs *inputs;
  int64_t is_bfloat16;
  int64_t blocks_of_piece[kMostFactors], end_of_pieces[kMostFactors];  // of the pieces of all factors

  static void work(void *context, int64_t piece) {
    const Job &job = *static_cast<Job *>(context);
    int64_t i = 0, begin = 0;
    while (piece >= job.end_of_pieces[i]) begin = job.end_of_pieces[i++];
    const mspc_matrix &m = *job.factors[i].matrix;
    int64_t first = (piece - begin) * job.blocks_of_piece[i];
    int64_t last = smaller(first + job.blocks_of_piece[i], num_blocks(m));
    job.kernels.product(m, job.inputs[i], first, last, Outputs{job.factors[i].y, job.is_bfloat16});
  }
};

struct Expansion {
  const mspc_matrix &m;
  int64_t first_block;
  float *out;

  static void work(void *context, int64_t piece) {
    const Expansion &job = *static_cast<Expansion *>(context);
    expand_block(job.m, job.first_block + piece, job.out + piece * kRows * job.m.columns);
  }
};

constexpr int64_t kWeightsOfPiece = 1 << 17;  // about 10 microseconds; waking a thread takes as long

void share_among(const Sharer &sharer, int64_t count, void (*work)(void *, int64_t), void *context) {
  share(*static_cast<const int64_t *>(sharer.threads), count, work, context);
}

}  // namespace

const Kernels &kernels_of(int64_t isa) {
#ifdef MSPC_X86
  if (isa == kAvx2) return avx2_kernels;
  if (isa == kAvx512) return avx512_kernels;
#endif
  (void)isa;
  return portable_kernels;
}

Sharer own_threads(const int64_t *threads) { return Sharer{share_among, threads}; }

void multiply(const Factor *factors, int64_t count, int64_t isa, const void *x, int64_t is_bfloat16, int64_t tokens,
              int64_t planes, const Sharer &sharer) {
  const Kernels &kernels = kernels_of(isa);
  Inputs inputs[kMostFactors];
  Job job{factors, kernels, inputs, is_bfloat16, {}, {}};
  int64_t pieces = 0;
  for (int64_t i = 0; i < count; i++) {
    const mspc_matrix &m = *factors[i].matrix;
    int64_t like = 0;  // the first factor whose inputs it shares
    while (!reads_alike(*factors[like].matrix, m)) like++;
    inputs[i] = like < i ? inputs[like] : inputs_in(scratches_of_thread()[i], m, tokens, planes);
    for (int64_t token = 0; token < tokens && like == i; token++)
      kernels.prepare(m, x, is_bfloat16, token, planes, &inputs[i]);
    job.blocks_of_piece[i] = 1 + kWeightsOfPiece / (kRows * num_positions(m));
    job.end_of_pieces[i] = pieces += ceil_div(num_blocks(m), job.blocks_of_piece[i]);
  }
  sharer.share(sharer, pieces, Job::work, &job);
}

extern "C" {

// What the library was built from (building.py).
EXPORTED int64_t mspc_fingerprint() { return MSPC_FINGERPRINT; }

// 1 if this processor and system run an instruction set (0 portable, 1 AVX2, 2 AVX-512).
EXPORTED int64_t mspc_has(int64_t isa) {
  if (isa == kPortable) return 1;
#ifdef MSPC_X86
  __builtin_cpu_init();
  if (isa == kAvx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  if (isa == kAvx512)
    return __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni");
#endif
  return 0;
}

// x (tokens, columns) -> y (tokens, rows), float32 or bfloat16. `planes` of inputs of codes: 2 are int16, 1 is int8.
EXPORTED void mspc_product(const mspc_matrix *m, int64_t isa, const void *x, int64_t is_bfloat16, int64_t tokens,
                  void *y, int64_t planes, int64_t threads) {
  Factor factor{m, y};
  multiply(&factor, 1, isa, x, is_bfloat16, tokens, planes, own_threads(&threads));
}

// The products of one token, float32, with `count` matrices of one shape, one after the other, as a step has them.
EXPORTED void mspc_products(const mspc_matrix *const *matrices, int64_t count, int64_t isa, const float *x, float *y,
                            int64_t planes, int64_t threads) {
  for (int64_t i = 0; i < count; i++) mspc_product(matrices[i], isa, x, 0, 1, y, planes, threads);
}

// Use the threads of an OpenMP library from now on, by its GOMP_parallel.
EXPORTED void mspc_use_team(void *gomp_parallel) {
  watch_forks();
  the_team.store(reinterpret_cast<Team>(gomp_parallel));
}

// The weight of some rows, first of them a whole block: float32 (rows, columns), codes times scales rounded once.
EXPORTED void mspc_expand(const mspc_matrix *m, int64_t first_row, int64_t num_rows, float *out, int64_t threads) {
  Expansion job{*m, first_row / kRows, out};
  share(threads, ceil_div(num_rows, kRows), Expansion::work, &job);
}
}
