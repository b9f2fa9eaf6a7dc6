// The few things of ONNX Runtime's C interface that onnx.cpp needs, by their places in memory.
//
// ONNX Runtime hands out a table of functions that only grows: a function keeps its place in all later versions. So
// neither its headers nor its library are needed to build this one. Version 17 is the first that lets an operator use the
// threads of its session; 1.17 and every newer ONNX Runtime have it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace onnx_abi {

constexpr uint32_t kVersion = 17;
constexpr int kFailed = 1, kInvalidArgument = 2, kInvalidGraph = 10;          // codes of a status
constexpr int kOfFloat32 = 1, kOfUint8 = 2, kOfInt64 = 7, kOfFloat16 = 10;    // types of elements
constexpr int kRequired = 0, kOptional = 1;                                   // inputs of an operator
constexpr int kDefaultMemory = 0;

// Its own; null is success where a status is returned.
struct Status;
struct SessionOptions;
struct Domain;
struct KernelInfo;
struct Context;
struct Value;
struct Shape;

// What an operator is. ONNX Runtime reads no further than `version` says.
struct Operator {
  uint32_t version;
  void *(*create)(const Operator *, void *const *table, const KernelInfo *);  // without a status; not used if the next is
  const char *(*name)(const Operator *);
  const char *(*provider)(const Operator *);
  int (*input_type)(const Operator *, size_t);
  size_t (*num_inputs)(const Operator *);
  int (*output_type)(const Operator *, size_t);
  size_t (*num_outputs)(const Operator *);
  void (*compute)(void *kernel, Context *);
  void (*destroy)(void *kernel);
  int (*input_kind)(const Operator *, size_t);
  int (*output_kind)(const Operator *, size_t);
  int (*input_memory)(const Operator *, size_t);
  int (*least_variadic_inputs)(const Operator *);
  int (*alike_variadic_inputs)(const Operator *);
  int (*least_variadic_outputs)(const Operator *);
  int (*alike_variadic_outputs)(const Operator *);
  Status *(*create_or_fail)(const Operator *, void *const *table, const KernelInfo *, void **kernel);
  Status *(*compute_or_fail)(void *kernel, Context *);
  Status *(*infer_shape)(const Operator *, void *);
  int (*first_version)(const Operator *);
  int (*last_version)(const Operator *);
};

// What a library is given when it is registered.
struct Base {
  void *const *(*table)(uint32_t version);  // null if this ONNX Runtime is older
  const char *(*version)();
};

// The functions, by their places in the table.
class Api {
  template <class Result, class... Arguments>
  using Function = Result (*)(Arguments...);

  template <class Result, class... Arguments>
  Function<Result, Arguments...> at(size_t place) const {
    return reinterpret_cast<Function<Result, Arguments...>>(table_[place]);
  }

  void *const *table_;

 public:
  explicit Api(void *const *table) : table_(table) {}

  Status *fail(int code, const char *message) const { return at<Status *, int, const char *>(0)(code, message); }
  Status *create_domain(const char *name, Domain **out) const {
    return at<Status *, const char *, Domain **>(26)(name, out);
  }
  Status *add(Domain *domain, const Operator *op) const {
    return at<Status *, Domain *, const Operator *>(27)(domain, op);
  }
  Status *add(SessionOptions *options, Domain *domain) const {
    return at<Status *, SessionOptions *, Domain *>(28)(options, domain);
  }
  Status *data(const Value *value, void **out) const {
    return at<Status *, Value *, void **>(51)(const_cast<Value *>(value), out);
  }
  Status *type(const Shape *shape, int *out) const { return at<Status *, const Shape *, int *>(60)(shape, out); }
  Status *rank(const Shape *shape, size_t *out) const { return at<Status *, const Shape *, size_t *>(61)(shape, out); }
  Status *sizes(const Shape *shape, int64_t *out, size_t rank) const {
    return at<Status *, const Shape *, int64_t *, size_t>(62)(shape, out, rank);
  }
  Status *count(const Shape *shape, size_t *out) const { return at<Status *, const Shape *, size_t *>(64)(shape, out); }
  Status *shape(const Value *value, Shape **out) const { return at<Status *, const Value *, Shape **>(65)(value, out); }
  Status *attribute(const KernelInfo *info, const char *name, int64_t *out) const {
    return at<Status *, const KernelInfo *, const char *, int64_t *>(86)(info, name, out);
  }
  Status *input(const Context *context, size_t index, const Value **out) const {
    return at<Status *, const Context *, size_t, const Value **>(90)(context, index, out);
  }
  Status *output(Context *context, size_t index, const int64_t *sizes, size_t rank, Value **out) const {
    return at<Status *, Context *, size_t, const int64_t *, size_t, Value **>(91)(context, index, sizes, rank, out);
  }
  void release(Shape *shape) const { at<void, Shape *>(99)(shape); }
  Status *constant(const KernelInfo *info, size_t index, int *is_constant, const Value **out) const {
    return at<Status *, const KernelInfo *, size_t, int *, const Value **>(249)(info, index, is_constant, out);
  }
  Status *parallel(const Context *context, void (*work)(void *, size_t), size_t count, void *of) const {
    constexpr size_t kNoLimit = 0;  // of batches
    return at<Status *, const Context *, void (*)(void *, size_t), size_t, size_t, void *>(274)(context, work, count,
                                                                                              kNoLimit, of);
  }
};

}  // namespace onnx_abi
