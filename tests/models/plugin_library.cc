// A library of TensorRT plugins, as a user of optc would have one.
//
// No package has TensorRT's headers, so what the interface asks for stands here in the fewest words:
// classes whose virtual functions have the order of NvInferRuntime.h (plugins of the third
// generation). The order is part of TensorRT's binary interface:
// https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/extending-custom-layers.html
//
// The operator Swirl (float x[...]) -> float y[...] of the domain acme.vision. It is built into
// engines; to run them it would need a kernel for the GPU, which it does not have.

#include <cstdint>
#include <cstring>

namespace {

struct Info {
  char const* kind;
  int32_t major, minor;
};

struct Dims {
  int32_t rank;
  int64_t extents[8];
};

struct Shape {
  int32_t rank;
  void const* extents[8];
};

struct Tensor {
  Dims dims;
  int32_t type;
  int32_t format;
  float scale;
};

struct DynamicTensor {
  Tensor tensor;
  Dims min, max, usual;
};

struct Field {
  char const* name;
  void const* data;
  int32_t type;
  int32_t length;
};

struct Fields {
  int32_t count;
  Field const* fields;
};

class Interface {
 public:
  virtual int32_t language() const noexcept { return 0; }
  virtual Info info() const noexcept = 0;
  virtual ~Interface() noexcept = default;
};

class Capability : public Interface {};

class Core : public Capability {
 public:
  Info info() const noexcept override { return {"PLUGIN_V3ONE_CORE", 1, 0}; }
  virtual char const* name() const noexcept { return "Swirl"; }
  virtual char const* version() const noexcept { return "1"; }
  virtual char const* space() const noexcept { return ""; }
};

class Build : public Capability {
 public:
  Info info() const noexcept override { return {"PLUGIN_V3ONE_BUILD", 1, 0}; }
  virtual int32_t configure(DynamicTensor const*, int32_t, DynamicTensor const*, int32_t) noexcept {
    return 0;
  }
  virtual int32_t types(int32_t* out, int32_t, int32_t const* in, int32_t) const noexcept {
    out[0] = in[0];
    return 0;
  }
  virtual int32_t shapes(Shape const* in, int32_t, Shape const*, int32_t, Shape* out, int32_t,
                         void*) noexcept {
    out[0] = in[0];
    return 0;
  }
  virtual bool supports(int32_t at, DynamicTensor const* tensors, int32_t, int32_t) noexcept {
    return tensors[at].tensor.type == 0 && tensors[at].tensor.format == 0;  // float, row-major
  }
  virtual int32_t outputs() const noexcept { return 1; }
  virtual size_t workspace(DynamicTensor const*, int32_t, DynamicTensor const*,
                           int32_t) const noexcept {
    return 0;
  }
  virtual int32_t tactics(int32_t*, int32_t) noexcept { return 0; }
  virtual int32_t tactic_count() noexcept { return 0; }
  virtual char const* timing_id() noexcept { return nullptr; }
  virtual int32_t most_formats() noexcept { return 100; }
  virtual char const* metadata() noexcept { return nullptr; }
};

class Run : public Capability {
 public:
  Info info() const noexcept override { return {"PLUGIN_V3ONE_RUNTIME", 1, 0}; }
  virtual int32_t set_tactic(int32_t) noexcept { return 0; }
  virtual int32_t shape_change(Tensor const*, int32_t, Tensor const*, int32_t) noexcept {
    return 0;
  }
  virtual int32_t enqueue(Tensor const*, Tensor const*, void const* const*, void* const*, void*,
                          void*) noexcept {
    return 1;  // an error: there is no kernel
  }
  virtual Interface* attach(void*) noexcept;
  virtual Fields const* fields() noexcept { return &saved; }

  Fields saved{0, nullptr};
};

class Plugin : public Interface {
 public:
  Info info() const noexcept override { return {"PLUGIN", 1, 0}; }
  virtual Capability* capability(int32_t type) noexcept {
    Capability* parts[] = {&core, &build, &run};
    return type >= 0 && type < 3 ? parts[type] : nullptr;
  }
  virtual Plugin* clone() noexcept {
    Plugin* copy = new Plugin;
    copy->set(gain);
    return copy;
  }

  void set(float value) {
    gain = value;
    field = {"gain", &gain, 1, 1};
    run.saved = {1, &field};
  }

  float gain = 1;
  Field field{};
  Core core;
  Build build;
  Run run;
};

Interface* Run::attach(void*) noexcept { return new Plugin; }

class Creator : public Interface {
 public:
  Info info() const noexcept override { return {"PLUGIN CREATOR_V3ONE", 1, 0}; }
  virtual Plugin* create(char const*, Fields const* given, int32_t) noexcept {
    Plugin* plugin = new Plugin;
    plugin->set(1);
    for (int32_t i = 0; i < given->count; i++)
      if (!strcmp(given->fields[i].name, "gain"))
        plugin->set(*static_cast<float const*>(given->fields[i].data));
    return plugin;
  }
  virtual Fields const* fields() noexcept { return &known; }
  virtual char const* name() const noexcept { return "Swirl"; }
  virtual char const* version() const noexcept { return "1"; }
  virtual char const* space() const noexcept { return ""; }

  Field field{"gain", nullptr, 1, 1};
  Fields known{1, &field};
};

Creator creator;

}  // namespace

extern "C" {

// What IPluginRegistry::loadLibrary() looks for.
Interface* const* getCreators(int32_t& count) {
  static Interface* const all[] = {&creator};
  count = 1;
  return all;
}

void setLoggerFinder(void*) {}
}
