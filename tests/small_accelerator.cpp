// An accelerator that is not there: a device with memory and generators of its own, and every operation computed by the
// CPU's kernels. Like CUDA, and unlike torch's fallback alone, it refuses tensors of two devices in one operation and
// generators of another device.

#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <cstdlib>
#include <cstring>

namespace {

constexpr auto KIND = c10::DeviceType::PrivateUse1;
constexpr auto KEY = c10::DispatchKey::PrivateUse1;
constexpr c10::DeviceIndex COUNT = 2;
thread_local c10::DeviceIndex current = 0;  // the backward pass has threads of its own

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = std::malloc(bytes == 0 ? 1 : bytes);
    return {data, data, &std::free, c10::Device(KIND, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(KIND, &memory);

// Devices that are done with everything as soon as they are told.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<KIND> {
  static constexpr c10::DeviceType static_type = KIND;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::Device exchangeDevice(c10::Device to) const override {
    const c10::Device from = getDevice();
    setDevice(to);
    return from;
  }
  c10::Device getDevice() const override { return {KIND, current}; }
  void setDevice(c10::Device to) const override { uncheckedSetDevice(to); }
  void uncheckedSetDevice(c10::Device to) const noexcept override {
    if (to.has_index()) current = to.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override { return COUNT; }
  c10::Stream getStream(c10::Device at) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, at); }
  c10::Stream getNewStream(c10::Device at, int) const override { return c10::Stream(c10::Stream::DEFAULT, at); }
  c10::Stream exchangeStream(c10::Stream to) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, to.device());
  }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

void resize(const c10::Storage& storage, size_t bytes) {
  auto data = memory.allocate(bytes);
  std::memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
  storage.set_data_ptr(std::move(data));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

// Draws what the CPU's generator draws.
struct Numbers final : c10::GeneratorImpl {
  Numbers(at::Generator drawn, c10::Device at) : GeneratorImpl(at, c10::DispatchKeySet(KEY)), inner(std::move(drawn)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  Numbers* clone_impl() const override { return new Numbers(inner.clone(), device()); }
  at::Generator inner;
};

struct Hooks final : at::PrivateUse1HooksInterface {
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    const c10::Device at{KIND, index < 0 ? current : index};
    return at::make_generator<Numbers>(at::detail::createCPUGenerator(), at);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    static std::array<at::Generator, COUNT> standard{getNewGenerator(0), getNewGenerator(1)};
    return standard.at(index < 0 ? current : index);
  }
  c10::DeviceIndex deviceCount() const override { return COUNT; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override { resize(storage, bytes); }
};

// The same bytes as the CPU sees them.
at::Tensor seen(const at::Tensor& x) {
  if (x.device().type() != KIND) return x;
  auto alias = at::from_blob(x.data_ptr(), x.sizes(), x.strides(), x.options().device(c10::kCPU));
  if (x.is_conj()) alias._set_conj(true);
  if (x.is_neg()) alias._set_neg(true);
  return alias;
}

at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  const c10::OptionalDeviceGuard there(device);
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(KEY), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard there(device);
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(KEY),
                                           c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  seen(to).copy_(seen(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar_dense(const at::Tensor& x) { return at::_local_scalar_dense(seen(x)); }

const at::Tensor& resize_(const at::Tensor& x, c10::IntArrayRef size, std::optional<c10::MemoryFormat>) {
  auto* whole = x.unsafeGetTensorImpl();
  whole->set_sizes_contiguous(size);
  auto bytes = at::detail::computeStorageNbytesContiguous(size, x.itemsize(), x.storage_offset());
  if (bytes > x.storage().nbytes()) resize(x.storage(), bytes);
  return x;
}

at::Tensor& set_storage(at::Tensor& x, c10::Storage storage, int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  x.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  x.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return x;
}

at::Tensor& set_whole_storage(at::Tensor& x, c10::Storage storage) {
  const auto size = static_cast<int64_t>(storage.nbytes() / x.itemsize());
  return set_storage(x, std::move(storage), 0, size, 1);
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b,
                       c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed,
                       c10::IntArrayRef output_padding, int64_t groups) {
  std::optional<at::Tensor> bias;
  if (b && b->defined()) bias = seen(*b);
  return at::convolution(seen(x), seen(w), bias, stride, padding, dilation, transposed, output_padding, groups)
      .to(x.device());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& slope, const at::Tensor& x, const at::Tensor& w, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding,
    int64_t groups, std::array<bool, 3> wanted) {
  auto [a, b, c] = at::convolution_backward(seen(slope), seen(x), seen(w), c10::IntArrayRef(w.size(0)), stride,
                                            padding, dilation, transposed, output_padding, groups, wanted);
  auto back = [&](const at::Tensor& t) { return t.defined() ? t.to(x.device()) : t; };
  return {back(a), back(b), back(c)};
}

// Its schema does not say that it changes the running statistics, so that the fallback would change copies of them.
std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm(
    const at::Tensor& x, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& variance, bool training, double momentum,
    double eps) {
  auto same = [](const std::optional<at::Tensor>& t) {
    return t && t->defined() ? std::optional<at::Tensor>(seen(*t)) : std::nullopt;
  };
  auto [a, b, c] = at::native_batch_norm(seen(x), same(weight), same(bias), same(mean), same(variance), training,
                                         momentum, eps);
  return {a.to(x.device()), b.to(x.device()), c.to(x.device())};
}

// What indexes may lie on the CPU, as CUDA has it; and a number (no dimensions) may always.
bool may_mix(const std::string& name) {
  return name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_" ||
         name == "aten::index_put";
}

void elsewhere(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  const auto count = op.schema().arguments().size();
  const auto first = stack->size() - count;
  std::optional<c10::Device> place;
  auto look = [&](const at::Tensor& x) {
    if (!x.defined() || (!x.is_privateuseone() && (x.dim() == 0 || may_mix(name)))) return;
    if (!place) place = x.is_privateuseone() ? x.device() : c10::Device(KIND, current);
    TORCH_CHECK(x.device() == *place, "Expected all tensors to be on the same device, but ", name, " got one on ",
                x.device(), " beside ", *place);
  };
  for (size_t i = first; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      look(value.toTensor());
    } else if (value.isTensorList()) {
      for (const auto& x : value.toTensorVector()) look(x);
    } else if (value.isOptionalTensorList()) {
      for (const auto& x : value.toOptionalTensorVector()) {
        if (x) look(*x);
      }
    } else if (value.isGenerator()) {
      auto* numbers = dynamic_cast<Numbers*>(value.toGenerator().unsafeGetGeneratorImpl());
      TORCH_CHECK(numbers != nullptr, "Expected a generator of this device, but ", name, " got one of another");
      value = numbers->inner;
    }
  }
  const c10::OptionalDeviceGuard there(place);
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&elsewhere>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("native_batch_norm", &batch_norm);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("device_count", [] { return static_cast<int>(COUNT); });
  m.def("current_device", [] { return static_cast<int>(current); });
  m.def("set_device", [](int index) { current = static_cast<c10::DeviceIndex>(index); });
}
