// The operator MatMul of the domain ai.mspc for ONNX Runtime, which loads this library by register_custom_ops_library.
//
// Its weights are initializers in the layouts of docs/cpu-kernels.md. They are multiplied where ONNX Runtime holds them,
// and the threads are those of its session.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "interface.h"
#include "onnx_abi.h"

extern "C" {
int64_t mspc_has(int64_t isa);
int64_t mspc_fits(const mspc_matrix *m, const int64_t *bytes);
}

namespace {

using namespace onnx_abi;

constexpr int64_t kLayout = 1;        // of repacked weights; exporters/onnx_sparse.py writes it
constexpr int64_t kMostAtOnce = 64;   // tokens
constexpr size_t kMostAxes = 8;
constexpr const char *kIsas[] = {"portable", "avx2", "avx512"};
constexpr size_t kX = 0, kParts = 5, kInputs = 1 + kParts;  // x, kept, marks, starts, scales, zeros
constexpr int kTypes[kInputs] = {kOfFloat32, kOfUint8, kOfUint8, kOfInt64, kOfFloat16, kOfUint8};
constexpr int64_t kBytes[kInputs] = {4, 1, 1, 8, 2, 1};
constexpr const char *kNames[kInputs] = {"x", "kept", "marks", "starts", "scales", "zeros"};

Status *failure(const Api &api, int code, const char *format, const char *what = "", long long number = 0) {
  char message[256];
  snprintf(message, sizeof message, format, what, number);
  return api.fail(code, message);
}

// Pages of 2 MB, with which a product misses the TLB hundreds of times less often. Linux copies to them what is there
// already. Where it has none, or cannot, everything stays as it is.
void ask_for_huge_pages(const void *memory, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  constexpr int kCollapse = 25;  // of Linux 6.1, which older headers do not name
  uintptr_t first = reinterpret_cast<uintptr_t>(memory), last = first + uintptr_t(bytes);
  for (uintptr_t page = first / kPage * kPage; page < last; page += kPage)
    if (madvise(reinterpret_cast<void *>(page), kPage, kCollapse)) continue;
#endif
  (void)memory, (void)bytes;
}

// The shape of a value for as long as it is asked.
class ShapeOf {
 public:
  ShapeOf(const Api &api, const Value *value) : api_(api) { status_ = api.shape(value, &shape_); }
  ~ShapeOf() {
    if (shape_) api_.release(shape_);
  }
  ShapeOf(const ShapeOf &) = delete;
  ShapeOf &operator=(const ShapeOf &) = delete;

  Status *status() const { return status_; }
  const Shape *get() const { return shape_; }

 private:
  const Api &api_;
  Shape *shape_ = nullptr;
  Status *status_;
};

struct MatMul {
  Api api;
  mspc_matrix matrix;
  int64_t isa, planes;  // 2: inputs of codes in 16 bits; 1: in 8
  void *copies[kParts];  // of parts that do not lie as their type must

  explicit MatMul(void *const *table) : api(table), matrix(), isa(0), planes(0), copies() {}
  ~MatMul() {
    for (void *copy : copies) free(copy);
  }
  MatMul(const MatMul &) = delete;
  MatMul &operator=(const MatMul &) = delete;

  Status *choose_isa() {
    const char *asked = getenv("MSPC_CPU_ISA");
    bool any = !asked || !*asked || !strcmp(asked, "torch");
    for (isa = 2; isa >= 0; isa--)
      if (any ? mspc_has(isa) : !strcmp(asked, kIsas[isa])) break;
    if (isa >= 0 && mspc_has(isa)) return nullptr;
    return failure(api, kInvalidArgument, "MSPC_CPU_ISA=%.64s is not to be had on this machine. Unset it.",
                   asked ? asked : "");
  }

  Status *read(const KernelInfo *info) {
    int64_t layout = 0, has_zeros = 0;
    const char *const names[] = {"layout", "rows", "columns", "group", "structure", "content", "planes", "has_zeros"};
    int64_t *const numbers[] = {&layout,           &matrix.rows,    &matrix.columns, &matrix.group,
                                &matrix.structure, &matrix.content, &planes,         &has_zeros};
    for (size_t i = 0; i < 8; i++) {
      if (Status *status = api.attribute(info, names[i], numbers[i])) return status;
      if (i == 0 && layout != kLayout)
        return failure(api, kInvalidGraph, "ai.mspc MatMul: its weights have%s layout %lld, and this library reads 1. "
                       "Take the library of the mspc that exported the model, or export it again.", "", layout);
    }
    void *parts[kParts] = {};
    int64_t bytes[kParts] = {};
    bool bitmap = matrix.structure == kBitmap, codes = has_codes(matrix);
    bool present[kParts] = {true, matrix.structure != kDense, bitmap, codes, has_zeros != 0};
    for (size_t part = 0; part < kParts; part++)
      if (present[part])
        if (Status *status = read_part(info, part, &parts[part], &bytes[part])) return status;
    matrix.kept = static_cast<uint8_t *>(parts[0]), matrix.marks = static_cast<uint8_t *>(parts[1]);
    matrix.starts = static_cast<int64_t *>(parts[2]), matrix.scales = static_cast<uint16_t *>(parts[3]);
    matrix.zeros = static_cast<uint8_t *>(parts[4]);
    if ((planes == 1 || planes == 2) && mspc_fits(&matrix, bytes)) {
      ask_for_huge_pages(matrix.kept, bytes[0]);
      ask_for_huge_pages(matrix.marks, bytes[1]);
      return nullptr;
    }
    return failure(api, kInvalidGraph, "ai.mspc MatMul: its weights do not fit its attributes. Export the model again.");
  }

  // The memory of an initializer.
  Status *read_part(const KernelInfo *info, size_t part, void **out, int64_t *bytes) {
    const Value *value = nullptr;
    int is_constant = 0, type = 0;
    size_t count = 0;
    if (Status *status = api.constant(info, part + 1, &is_constant, &value)) return status;
    if (!is_constant || !value)
      return failure(api, kInvalidGraph, "ai.mspc MatMul: its input %.16s is no initializer.", kNames[part + 1]);
    ShapeOf shape(api, value);
    if (shape.status()) return shape.status();
    if (Status *status = api.type(shape.get(), &type)) return status;
    if (Status *status = api.count(shape.get(), &count)) return status;
    if (type != kTypes[part + 1])
      return failure(api, kInvalidGraph, "ai.mspc MatMul: its input %.16s has the type %lld.", kNames[part + 1], type);
    if (Status *status = api.data(value, out)) return status;
    *bytes = int64_t(count) * kBytes[part + 1];
    if (reinterpret_cast<uintptr_t>(*out) % size_t(kBytes[part + 1]) == 0) return nullptr;
    copies[part] = malloc(size_t(*bytes));  // a file was mapped, and it lies there at any byte
    if (!copies[part]) return failure(api, kFailed, "ai.mspc MatMul: there is no memory for a copy.");
    *out = memcpy(copies[part], *out, size_t(*bytes));
    return nullptr;
  }

  Status *compute(Context *context) const {
    const Value *x = nullptr;
    Value *y = nullptr;
    size_t rank = 0;
    int64_t sizes[kMostAxes];
    if (Status *status = api.input(context, kX, &x)) return status;
    ShapeOf shape(api, x);
    if (shape.status()) return shape.status();
    if (Status *status = api.rank(shape.get(), &rank)) return status;
    if (rank < 1 || rank > kMostAxes)
      return failure(api, kInvalidArgument, "ai.mspc MatMul: x has%s %lld axes.", "", static_cast<long long>(rank));
    if (Status *status = api.sizes(shape.get(), sizes, rank)) return status;
    if (sizes[rank - 1] != matrix.columns)
      return failure(api, kInvalidArgument, "ai.mspc MatMul: x has%s %lld columns, which are not those of the weight.",
                     "", sizes[rank - 1]);
    int64_t tokens = 1;
    for (size_t axis = 0; axis + 1 < rank; axis++) tokens *= sizes[axis];
    sizes[rank - 1] = matrix.rows;
    if (Status *status = api.output(context, 0, sizes, rank, &y)) return status;
    void *from = nullptr, *to = nullptr;
    if (Status *status = api.data(x, &from)) return status;
    if (Status *status = api.data(y, &to)) return status;
    return product(context, static_cast<const float *>(from), static_cast<float *>(to), tokens);
  }

  Status *product(Context *context, const float *x, float *y, int64_t tokens) const;
};

// The threads of the session, and the first thing that went wrong with them.
struct Session {
  const Api &api;
  const Context *context;
  Status *status;
};

struct Pieces {
  void (*work)(void *, int64_t);
  void *context;

  static void run(void *of, size_t piece) {
    const Pieces &pieces = *static_cast<Pieces *>(of);
    pieces.work(pieces.context, int64_t(piece));
  }
};

void share_in_session(const Sharer &sharer, int64_t count, void (*work)(void *, int64_t), void *context) {
  Session &session = *static_cast<Session *>(const_cast<void *>(sharer.threads));
  Pieces pieces{work, context};
  if (count == 1)
    work(context, 0);
  else if (!session.status)
    session.status = session.api.parallel(session.context, Pieces::run, size_t(count), &pieces);
}

Status *MatMul::product(Context *context, const float *x, float *y, int64_t tokens) const {
  Session session{api, context, nullptr};
  for (int64_t first = 0; first < tokens && !session.status; first += kMostAtOnce) {
    Factor factor{&matrix, y + first * matrix.rows};
    multiply(&factor, 1, isa, x + first * matrix.columns, 0, smaller(kMostAtOnce, tokens - first), planes,
             Sharer{share_in_session, &session});
  }
  return session.status;
}

Status *create(const Operator *, void *const *table, const KernelInfo *info, void **kernel) {
  Api api(table);
  void *memory = malloc(sizeof(MatMul));
  if (!memory) return failure(api, kFailed, "ai.mspc MatMul: there is no memory.");
  MatMul *made = new (memory) MatMul(table);
  Status *status = made->choose_isa();
  if (!status) status = made->read(info);
  if (!status) {
    *kernel = made;
    return nullptr;
  }
  made->~MatMul();
  free(memory);
  return status;
}

void destroy(void *kernel) {
  static_cast<MatMul *>(kernel)->~MatMul();
  free(kernel);
}

const Operator kMatMul = {
    kVersion,
    nullptr,
    [](const Operator *) { return "MatMul"; },
    [](const Operator *) { return "CPUExecutionProvider"; },
    [](const Operator *, size_t index) { return kTypes[index]; },
    [](const Operator *) { return kInputs; },
    [](const Operator *, size_t) { return kOfFloat32; },
    [](const Operator *) { return size_t(1); },
    nullptr,
    destroy,
    [](const Operator *, size_t index) { return index < 2 ? kRequired : kOptional; },
    [](const Operator *, size_t) { return kRequired; },
    [](const Operator *, size_t) { return kDefaultMemory; },
    [](const Operator *) { return 1; },  // of variadic inputs and outputs, which it has none of
    [](const Operator *) { return 1; },
    [](const Operator *) { return 1; },
    [](const Operator *) { return 1; },
    create,
    [](void *kernel, Context *context) { return static_cast<const MatMul *>(kernel)->compute(context); },
    nullptr,
    [](const Operator *) { return 1; },
    [](const Operator *) { return 0x7fffffff; },
};

}  // namespace

extern "C" {

// Called by ONNX Runtime with the options of a session. A domain lives on, as nothing says when its last session ends.
EXPORTED Status *RegisterCustomOps(SessionOptions *options, const Base *base) {
  void *const *table = base->table(kVersion);
  if (!table)
    return failure(Api(base->table(1)), kFailed, "mspc needs ONNX Runtime 1.17 or newer, and this is %.32s. Upgrade it.",
                   base->version());
  Api api(table);
  Domain *domain = nullptr;
  if (Status *status = api.create_domain("ai.mspc", &domain)) return status;
  if (Status *status = api.add(domain, &kMatMul)) return status;
  return api.add(options, domain);
}
}
