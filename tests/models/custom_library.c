/* A library of ONNX Runtime custom operators, as a user of optc would have one.
 *
 * ONNX Runtime's wheel has no headers. Its C interface is a table of functions whose order is fixed
 * for good (new ones are added at the end), so a library that uses a few old ones needs no more than
 * their places in it, and the beginning of what describes an operator, as both have been since
 * version 8 of the interface:
 * https://onnxruntime.ai/docs/api/c/struct_ort_api.html
 *
 * Domain acme.vision:
 *     Swirl (float x[...]) -> float y[...]        gain * x * |x|; attribute gain
 *     Peaks (float x[n, c, h, w]) -> int64 at[k, 4], bool any[n]
 *                                                  where x is above the attribute level, in order
 *
 * Compiled with -DVERSION=99 it asks for an interface that no ONNX Runtime has, and refuses to be
 * registered; with -DREFUSES it returns an error; with -DCRASHES it dies on loading.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#ifndef VERSION
#define VERSION 8
#endif

typedef const void *Status; /* NULL: all is well */
typedef void *const *Api;   /* a table of functions */

typedef struct {
  Api (*get)(uint32_t version);
  const char *(*version)(void);
} Base;

enum {
  CREATE_STATUS = 0,
  CREATE_DOMAIN = 26,
  ADD_OPERATOR = 27,
  ADD_DOMAIN = 28,
  DATA_OF = 51,
  RANK_OF = 61,
  DIMS_OF = 62,
  TYPE_OF = 65,
  ATTRIBUTE = 85,
  INPUT = 90,
  OUTPUT = 91,
  RELEASE_TYPE = 99
};

enum { FLOAT = 1, INT64 = 7, BOOL = 9 };

typedef Status (*CreateStatus)(int code, const char *words);
typedef Status (*CreateDomain)(const char *name, void **domain);
typedef Status (*Add)(void *to, const void *what);
typedef Status (*DataOf)(void *value, void **data);
typedef Status (*TypeOf)(const void *value, void **type);
typedef Status (*RankOf)(const void *type, size_t *rank);
typedef Status (*DimsOf)(const void *type, int64_t *dims, size_t rank);
typedef void (*ReleaseType)(void *type);
typedef Status (*Attribute)(const void *info, const char *name, float *value);
typedef Status (*Input)(const void *context, size_t index, const void **value);
typedef Status (*Output)(void *context, size_t index, const int64_t *dims, size_t rank, void **value);

typedef struct Operator Operator;
struct Operator {
  uint32_t version;
  void *(*create)(const Operator *, Api, const void *info);
  const char *(*name)(const Operator *);
  const char *(*provider)(const Operator *);
  int (*input_type)(const Operator *, size_t);
  size_t (*input_count)(const Operator *);
  int (*output_type)(const Operator *, size_t);
  size_t (*output_count)(const Operator *);
  void (*compute)(void *kernel, void *context);
  void (*destroy)(void *kernel);
  int (*input_kind)(const Operator *, size_t);
  int (*output_kind)(const Operator *, size_t);
};

#define CALL(api, place, type) ((type)(api)[place])

typedef struct {
  Api api;
  float number; /* the one attribute */
} Kernel;

typedef struct {
  const float *data;
  int64_t dims[8];
  size_t rank;
  int64_t count;
} Tensor;

static Kernel *kernel_of(Api api, const void *info, const char *attribute) {
  Kernel *kernel = malloc(sizeof *kernel);
  kernel->api = api;
  CALL(api, ATTRIBUTE, Attribute)(info, attribute, &kernel->number);
  return kernel;
}

static Tensor input(Api api, void *context) {
  Tensor tensor = {.count = 1};
  const void *value;
  void *type;
  CALL(api, INPUT, Input)(context, 0, &value);
  CALL(api, DATA_OF, DataOf)((void *)value, (void **)&tensor.data);
  CALL(api, TYPE_OF, TypeOf)(value, &type);
  CALL(api, RANK_OF, RankOf)(type, &tensor.rank);
  CALL(api, DIMS_OF, DimsOf)(type, tensor.dims, tensor.rank);
  CALL(api, RELEASE_TYPE, ReleaseType)(type);
  for (size_t axis = 0; axis < tensor.rank; axis++) tensor.count *= tensor.dims[axis];
  return tensor;
}

static void *output(Api api, void *context, size_t index, const int64_t *dims, size_t rank) {
  void *value, *data;
  CALL(api, OUTPUT, Output)(context, index, dims, rank, &value);
  CALL(api, DATA_OF, DataOf)(value, &data);
  return data;
}

static const char *on_cpu(const Operator *self) { return NULL; }
static size_t one(const Operator *self) { return 1; }
static size_t two(const Operator *self) { return 2; }
static int required(const Operator *self, size_t index) { return 0; }
static int floats(const Operator *self, size_t index) { return FLOAT; }

/* --- Swirl */

static const char *swirl_name(const Operator *self) { return "Swirl"; }

static void *swirl_create(const Operator *self, Api api, const void *info) {
  return kernel_of(api, info, "gain");
}

static void swirl(void *kernel, void *context) {
  Kernel *self = kernel;
  Tensor x = input(self->api, context);
  float *y = output(self->api, context, 0, x.dims, x.rank);
  for (int64_t i = 0; i < x.count; i++)
    y[i] = self->number * x.data[i] * (x.data[i] < 0 ? -x.data[i] : x.data[i]);
}

/* --- Peaks */

static const char *peaks_name(const Operator *self) { return "Peaks"; }
static int peaks_type(const Operator *self, size_t index) { return index ? BOOL : INT64; }

static void *peaks_create(const Operator *self, Api api, const void *info) {
  return kernel_of(api, info, "level");
}

static void peaks(void *kernel, void *context) {
  Kernel *self = kernel;
  Tensor x = input(self->api, context);
  int64_t found = 0;
  for (int64_t i = 0; i < x.count; i++) found += x.data[i] > self->number;
  int64_t dims[2] = {found, 4};
  int64_t *at = output(self->api, context, 0, dims, 2);
  bool *any = output(self->api, context, 1, x.dims, 1);
  for (int64_t n = 0; n < x.dims[0]; n++) any[n] = false;
  for (int64_t i = 0; i < x.count; i++) {
    if (!(x.data[i] > self->number)) continue;
    int64_t rest = i;
    for (int axis = 3; axis >= 0; axis--) {
      at[axis] = rest % x.dims[axis];
      rest /= x.dims[axis];
    }
    any[at[0]] = true;
    at += 4;
  }
}

/* --- what ONNX Runtime asks for */

static const Operator SWIRL = {VERSION, swirl_create, swirl_name, on_cpu,   floats,  one,
                               floats,  one,          swirl,      free,     required, required};
static const Operator PEAKS = {VERSION,    peaks_create, peaks_name, on_cpu, floats,   one,
                               peaks_type, two,          peaks,      free,   required, required};

#ifdef CRASHES
__attribute__((constructor)) static void crash(void) { abort(); }
#endif

Status RegisterCustomOps(void *options, const Base *base) {
  Api api = base->get(1); /* which every version has */
  void *domain;
  Status status;
  if (!base->get(VERSION))
    return CALL(api, CREATE_STATUS, CreateStatus)(1, "acme.vision needs a newer ONNX Runtime");
#ifdef REFUSES
  return CALL(api, CREATE_STATUS, CreateStatus)(1, "acme.vision has no licence");
#endif
  if ((status = CALL(api, CREATE_DOMAIN, CreateDomain)("acme.vision", &domain))) return status;
  if ((status = CALL(api, ADD_OPERATOR, Add)(domain, &SWIRL))) return status;
  if ((status = CALL(api, ADD_OPERATOR, Add)(domain, &PEAKS))) return status;
  return CALL(api, ADD_DOMAIN, Add)(options, domain);
}
