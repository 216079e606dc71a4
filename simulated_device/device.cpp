// A device of its own for torch, in memory of the host, on which mistakes with streams and memory show.
//
// * Its memory is protected from everybody else: whoever reads it from the host dies.
// * Copies between it and page-locked memory that need not be done at once (non_blocking) are done as late as
//   possible: when somebody waits for them. Whoever does not wait finds what lay there before, NaN at first.
// * Each use of its memory is noted with what its stream was told to wait for. Two uses of the same bytes, of
//   which one writes, must be in order, and so must the next use of memory that was given back. What is not in
//   order is a race, though all other operations are those of the CPU, done at once and correct.
// * It has a size, and raises what torch raises when it is full.
//
// Streams are numbered, 0 being the one that everybody begins with. There is one device.

#include <ATen/EmptyTensor.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_cpu_dispatch.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/extension.h>

#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>

namespace {

using at::Tensor;
using c10::StreamId;

constexpr auto kind = c10::DeviceType::PrivateUse1;
const c10::Device the_device(kind, 0);
constexpr size_t page = 4096;
constexpr int untouched = 0xff;  // NaN in every format of floating point

std::recursive_mutex mutex;  // of all that follows

// Whoever has the lock may have to wait for Python's, as to count the references of a tensor. So nobody waits for
// the lock and keeps Python's meanwhile.
struct Lock {
  Lock() {
    if (mutex.try_lock()) return;
    if (Py_IsInitialized() && PyGILState_Check()) {
      py::gil_scoped_release without;
      mutex.lock();
    } else {
      mutex.lock();
    }
  }
  ~Lock() { mutex.unlock(); }
  Lock(const Lock&) = delete;
};

// -- streams -----------------------------------------------------------------------------------------------

// For each stream, how much of its work comes before.
struct Clock : std::map<StreamId, uint64_t> {
  void wait_for(const Clock& other) {
    for (auto [stream, count] : other) (*this)[stream] = std::max((*this)[stream], count);
  }
};

struct Place {  // in the queue of late copies of a stream
  StreamId stream = 0;
  uint64_t number = 0;
};

struct Queue {
  std::deque<std::function<void()>> late;
  uint64_t told = 0, done = 0;
  Clock before;

  void tell(std::function<void()> copy) {
    late.push_back(std::move(copy));
    ++told;
  }
  void run_until(uint64_t number) {
    while (done < number) {
      auto copy = std::move(late.front());
      late.pop_front();
      copy();
      ++done;
    }
  }
};

std::deque<Queue> queues(1);
thread_local StreamId current = 0;
Clock host;  // what the host has waited for is over
std::vector<std::string> races;

bool is_past(const Place& place) { return queues[place.stream].done >= place.number; }
void run_until(const Place& place) { queues[place.stream].run_until(place.number); }
void finish(StreamId stream) { queues[stream].run_until(queues[stream].told); }

void wait_on_host(StreamId stream) {
  finish(stream);
  host.wait_for(queues[stream].before);
}
void wait_on_host_for_all() {
  for (StreamId stream = 0; stream < StreamId(queues.size()); ++stream) wait_on_host(stream);
}

struct Event {
  Place place;
  Clock before;
};

// -- memory of the device ----------------------------------------------------------------------------------

struct Use {
  StreamId stream;
  uint64_t number;
  bool writes;
  char *begin, *end;
  std::string operation;
};

struct Block {
  char* start;
  size_t size;
  StreamId stream;
  bool is_given = false;
  std::set<StreamId> recorded;
  std::vector<Place> busy;  // until then it is not given to anyone
  std::vector<Use> uses;
  int opened = 0;
};
std::map<char*, Block> blocks;
size_t capacity = size_t(1) << 36, others = size_t(1) << 26, reserved = 0, allocated = 0, peak = 0, ever = 0;

template <typename T>
T* containing(std::map<char*, T>& all, const void* address) {
  auto after = all.upper_bound((char*)address);
  if (after == all.begin()) return nullptr;
  auto& block = std::prev(after)->second;
  return (char*)address < block.start + block.size ? &block : nullptr;
}

// The device's own access to the block around an address.
struct Access {
  Block* block;
  explicit Access(const void* address) : block(containing(blocks, address)) {
    if (block && !block->opened++) mprotect(block->start, block->size, PROT_READ | PROT_WRITE);
  }
  ~Access() {
    if (block && !--block->opened) mprotect(block->start, block->size, PROT_NONE);
  }
  Access(const Access&) = delete;
};

void check(const Block& block, const Clock& before, bool writes, char* begin, char* end, const std::string& what) {
  for (const auto& use : block.uses) {
    auto found = before.find(use.stream);
    bool is_before = found != before.end() && found->second >= use.number;
    if (!is_before && (writes || use.writes) && use.begin < end && begin < use.end)
      races.push_back(what + " what " + use.operation + " of stream " + std::to_string(use.stream) + (use.writes ? " writes" : " reads"));
  }
}

// Note that the current stream uses a tensor.
void use(const Tensor& tensor, bool writes, const char* operation) {
  auto block = tensor.numel() ? containing(blocks, tensor.data_ptr()) : nullptr;
  if (!block) return;
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  auto begin = (char*)tensor.data_ptr(), end = begin + (last + 1) * tensor.element_size();
  const auto& before = queues[current].before;
  check(*block, before, writes, begin, end, c10::str("stream ", current, ": ", operation, " uses"));
  auto is_over = [](const Use& use) {
    auto found = host.find(use.stream);
    return found != host.end() && found->second >= use.number;
  };
  auto& uses = block->uses;
  uses.erase(std::remove_if(uses.begin(), uses.end(), is_over), uses.end());
  uses.push_back({current, before.at(current), writes, begin, end, operation});
}

void launch() {
  auto& before = queues[current].before;
  before.wait_for(host);
  ++before[current];
}

void give_back_cached() {
  wait_on_host_for_all();
  for (auto next = blocks.begin(); next != blocks.end();) {
    auto& block = next->second;
    if (block.is_given) {
      ++next;
      continue;
    }
    munmap(block.start, block.size);
    reserved -= block.size;
    next = blocks.erase(next);
  }
}

void free_block(void* context) {
  if (!context) return;
  Lock lock;
  auto& block = *(Block*)context;
  allocated -= block.size;
  block.is_given = false;
  auto& uses = block.uses;
  for (auto stream : block.recorded) {
    block.busy.push_back({stream, queues[stream].told});
    auto is_its = [=](const Use& use) { return use.stream == stream; };
    uses.erase(std::remove_if(uses.begin(), uses.end(), is_its), uses.end());
  }
  block.recorded.clear();
}

Block* cached(size_t size) {
  for (auto& [start, block] : blocks) {
    if (block.is_given || block.stream != current || block.size != size) continue;
    if (std::all_of(block.busy.begin(), block.busy.end(), is_past)) return &block;
  }
  return nullptr;
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    if (!nbytes) return {nullptr, nullptr, &free_block, the_device};
    Lock lock;
    size_t size = (nbytes + page - 1) / page * page;
    auto block = cached(size);
    if (!block) {
      if (reserved + others + size > capacity) give_back_cached();
      TORCH_CHECK_WITH(OutOfMemoryError, reserved + others + size <= capacity,
                       "the simulated device is out of memory: tried to allocate ", size, " bytes, ",
                       capacity - std::min(capacity, reserved + others), " are free.");
      auto start = (char*)mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      TORCH_CHECK(start != MAP_FAILED, "the host has no memory for the simulated device");
      block = &(blocks[start] = Block{start, size, current});
      reserved += size;
    }
    auto& queue = queues[current];
    queue.before.wait_for(host);
    check(*block, queue.before, true, block->start, block->start + size, c10::str("stream ", current, " is given"));
    block->busy.clear();
    block->uses.clear();
    block->is_given = true;
    allocated += size;
    ever += size;
    peak = std::max(peak, allocated);
    if (queue.done == queue.told) {  // nothing of this stream is yet to read what was here
      Access access(block->start);
      std::memset(block->start, untouched, size);
    }
    return {block->start, block, &free_block, the_device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void*, const void*, size_t) const override { TORCH_CHECK(false, "copy_data of the device"); }
} device_allocator;
REGISTER_ALLOCATOR(kind, &device_allocator);

// -- page-locked memory of the host: kept, and given again as torch does it ----------------------------------

struct HostBlock {
  char* start;
  size_t size;
  bool is_given = true;
  std::vector<Place> busy;
};
std::map<char*, HostBlock> host_blocks;
bool refuses_page_locked = false;

void free_host_block(void* context) {
  if (!context) return;
  Lock lock;
  auto& block = *(HostBlock*)context;
  block.is_given = false;
  if (std::all_of(block.busy.begin(), block.busy.end(), is_past)) std::memset(block.start, untouched, block.size);
}

struct HostAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t nbytes) override {
    if (!nbytes) return {nullptr, nullptr, &free_host_block, c10::kCPU};
    Lock lock;
    TORCH_CHECK(!refuses_page_locked, "the driver refuses page-locked memory");
    size_t size = page;
    while (size < nbytes) size *= 2;
    for (auto& [start, block] : host_blocks) {
      if (block.is_given || block.size != size || !std::all_of(block.busy.begin(), block.busy.end(), is_past)) continue;
      block.is_given = true;
      block.busy.clear();
      return {start, &block, &free_host_block, c10::kCPU};
    }
    auto start = (char*)mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(start != MAP_FAILED, "the host has no memory to lock");
    auto& block = host_blocks[start] = HostBlock{start, size};
    return {start, &block, &free_host_block, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_host_block; }
  void copy_data(void* to, const void* from, size_t nbytes) const override { std::memcpy(to, from, nbytes); }

  // As torch's: knows its own blocks, by what frees them or by where they begin, and nothing that lies inside.
  bool record_event(void* address, void* context, c10::Stream stream) override {
    Lock lock;
    for (auto& [start, block] : host_blocks) {
      if (context != &block && address != start) continue;
      block.busy.push_back({stream.id(), queues[stream.id()].told});
      return true;
    }
    return false;
  }
  void empty_cache() override {
    Lock lock;
    for (auto next = host_blocks.begin(); next != host_blocks.end();) {
      auto& block = next->second;
      bool goes = !block.is_given && std::all_of(block.busy.begin(), block.busy.end(), is_past);
      if (goes) munmap(block.start, block.size);
      next = goes ? host_blocks.erase(next) : std::next(next);
    }
  }
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
} host_allocator;
REGISTER_HOST_ALLOCATOR(kind, &host_allocator);

// -- what torch asks of a device -----------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream(StreamId id) { return c10::Stream(c10::Stream::UNSAFE, the_device, id); }

  c10::DeviceType type() const override { return kind; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return the_device; }
  c10::Device exchangeDevice(c10::Device) const override { return the_device; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}

  c10::Stream getStream(c10::Device) const override { return stream(current); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device where, bool) const override { return getNewStream(where); }
  c10::Stream getNewStream(c10::Device, int = 0) const override {
    Lock lock;
    queues.emplace_back();
    return stream(queues.size() - 1);
  }
  c10::Stream exchangeStream(c10::Stream next) const override { return stream(std::exchange(current, next.id())); }
  bool queryStream(const c10::Stream& stream) const override {
    Lock lock;
    auto& queue = queues[stream.id()];
    return queue.done == queue.told;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    Lock lock;
    wait_on_host(stream.id());
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    Lock lock;
    wait_on_host_for_all();
  }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    Lock lock;
    if (!*event) *event = new Event;
    auto& queue = queues[stream.id()];
    *(Event*)*event = {{stream.id(), queue.told}, queue.before};
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (!event) return;
    Lock lock;
    auto& [place, before] = *(Event*)event;
    auto& queue = queues[stream.id()];
    queue.before.wait_for(before);
    if (!is_past(place)) queue.tell([place = place] { run_until(place); });
  }
  bool queryEvent(void* event) const override {
    Lock lock;
    return !event || is_past(((Event*)event)->place);
  }
  void synchronizeEvent(void* event) const override {
    if (!event) return;
    Lock lock;
    run_until(((Event*)event)->place);
    host.wait_for(((Event*)event)->before);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete (Event*)event; }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    Lock lock;
    if (auto block = containing(blocks, data.get())) block->recorded.insert(stream.id());
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Generator final : c10::GeneratorImpl {  // random numbers are those of a CPU
  at::Generator numbers = at::detail::createCPUGenerator();

  Generator() : c10::GeneratorImpl(the_device, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
  void set_current_seed(uint64_t seed) override { numbers.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { numbers.set_offset(offset); }
  uint64_t get_offset() const override { return numbers.get_offset(); }
  uint64_t current_seed() const override { return numbers.current_seed(); }
  uint64_t seed() override { return numbers.seed(); }
  void set_state(const c10::TensorImpl& state) override { numbers.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return numbers.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override {
    auto twin = new Generator;
    twin->numbers = numbers.clone();
    return twin;
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Device getDeviceFromPtr(void*) const override { return the_device; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &host_allocator; }
  bool isPinnedPtr(const void* data) const override {
    Lock lock;
    return containing(host_blocks, data) != nullptr;
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator generator = at::make_generator<Generator>();
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex = -1) const override { return at::make_generator<Generator>(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto impl = storage.unsafeGetStorageImpl();
    auto grown = device_allocator.allocate(size);
    Lock lock;
    finish(current);
    if (auto nbytes = std::min(size, impl->nbytes())) {
      Access from(impl->data()), to(grown.get());
      std::memcpy(grown.get(), impl->data(), nbytes);
    }
    impl->set_data_ptr_noswap(std::move(grown));
    impl->set_nbytes(size);
  }
} hooks;

// -- operations ----------------------------------------------------------------------------------------------

const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
thread_local bool in_kernel = false;  // what is copied now is what a kernel reads or writes

bool is_here(const Tensor& tensor) { return tensor.device().type() == kind; }

void check_index(std::optional<at::Device> where) {
  TORCH_CHECK(!where || where->index() <= 0, "there is one simulated device; asked for number ", int(where->index()));
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> where, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  check_index(where);
  return at::detail::empty_generic(size, &device_allocator, keys, at::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> where, std::optional<bool>) {
  check_index(where);
  return at::detail::empty_strided_generic(size, stride, &device_allocator, keys, at::dtype_or_default(dtype));
}

Tensor as_of_host(const Tensor& tensor) {  // the same memory
  if (!is_here(tensor)) return tensor;
  auto options = tensor.options().device(at::kCPU).requires_grad(false);
  auto view = at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), options);
  if (tensor.is_conj()) view = at::_conj(view);
  return tensor.is_neg() ? at::_neg_view(view) : view;
}

// Copies between blocks that are open; no mode of the caller has a part in it.
void copy_bytes(const Tensor& from, const Tensor& to) {
  at::AutoDispatchBelowAutograd below;
  c10::impl::ExcludeDispatchKeyGuard apart(
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot}));
  as_of_host(to).copy_(as_of_host(from));
}

Tensor copy_from(const Tensor& from_, const Tensor& to, bool non_blocking) {
  if (!to.numel()) return to;
  auto from = from_.sizes() == to.sizes() ? from_ : from_.expand(to.sizes());
  Lock lock;
  if (!in_kernel) {
    launch();
    use(from, false, "copy");
    use(to, true, "copy");
  }
  bool crosses = is_here(from) != is_here(to);
  const auto& on_host = is_here(from) ? to : from;
  bool is_plain = from.dtype() == to.dtype() && from.strides() == to.strides() && from.is_conj() == to.is_conj() &&
                  from.is_neg() == to.is_neg() && from.is_non_overlapping_and_dense();
  if (crosses && non_blocking && is_plain && hooks.isPinnedPtr(on_host.data_ptr())) {
    void *there = to.data_ptr(), *here = from.data_ptr();
    queues[current].tell([=, nbytes = to.nbytes()] {
      Access to(there), from(here);
      std::memcpy(there, here, nbytes);
    });
    host_allocator.record_event(on_host.data_ptr(), on_host.storage().data_ptr().get_context(), Guard::stream(current));
    return to;
  }
  finish(current);
  {
    Access a(from.data_ptr()), b(to.data_ptr());
    copy_bytes(from, to);
  }
  if (crosses && !in_kernel && !(non_blocking && is_here(to))) wait_on_host(current);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  size_t nbytes = (c10::multiply_integers(size) + self.storage_offset()) * self.element_size();
  if (nbytes > self.storage().nbytes()) hooks.resizePrivateUse1Bytes(self.storage(), nbytes);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

Tensor& set_storage_at(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  if (size.size() == stride.size()) {
    impl->set_sizes_and_strides(size, stride, offset);
  } else {
    impl->set_sizes_contiguous(size);
    impl->set_storage_offset(offset);
  }
  return self;
}
Tensor& set_storage(Tensor& self, at::Storage source) {
  int64_t length = source.nbytes() / self.element_size();
  return set_storage_at(self, std::move(source), 0, {length}, {1});
}
Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage_at(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}
Tensor& set_nothing(Tensor& self) {
  return set_storage(self, c10::Storage(c10::Storage::use_byte_size_t(), 0, &device_allocator, /*resizable=*/true));
}

void record_stream(Tensor& self, at::Stream stream) {
  Guard().recordDataPtrOnStream(self.storage().data_ptr(), stream);
}

// Views only: nothing happens on the device.
Tensor as_strided(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::cpu::as_strided(self, size, stride, offset);
}
Tensor view(const Tensor& self, at::IntArrayRef size) { return at::cpu::view(self, size); }
Tensor reshape_alias(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::cpu::_reshape_alias(self, size, stride);
}

// Values that the host asks for.
at::Scalar item(const Tensor& self) { return self.cpu().item(); }
bool equal(const Tensor& a, const Tensor& b) {
  TORCH_CHECK(a.device() == b.device(), "expected all tensors to be on the same device");
  return at::equal(a.cpu(), b.cpu());
}

struct InKernel {
  bool before = std::exchange(in_kernel, true);
  ~InKernel() { in_kernel = before; }
};

// A convolution is the one operation that torch does not leave to what follows.
Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                   int64_t groups) {
  {
    Lock lock;
    launch();
    finish(current);
    use(input, false, "convolution");
    use(weight, false, "convolution");
    if (bias && bias->defined()) use(*bias, false, "convolution");
  }
  InKernel inside;
  auto on_host = bias && bias->defined() ? std::optional(bias->cpu()) : std::nullopt;
  return at::convolution(input.cpu(), weight.cpu(), on_host, stride, padding, dilation, transposed, output_padding, groups)
      .to(the_device);
}

// All other operations: those of the CPU.
void compute(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const auto& schema = operation.schema();
  auto name = schema.name();
  auto arguments = torch::jit::last(*stack, schema.arguments().size());
  {
    Lock lock;
    launch();
    finish(current);
    for (size_t i = 0; i < arguments.size(); ++i) {
      const auto& value = arguments[i];
      auto alias = schema.arguments()[i].alias_info();
      bool writes = alias && alias->isWrite();
      auto note = [&](const Tensor& tensor) {
        if (!tensor.defined()) return;
        if (is_here(tensor)) return use(tensor, writes, name.c_str());
        TORCH_CHECK(!tensor.dim() || name.find("aten::index") == 0 || name.find("aten::_index") == 0, "expected all ",
                    "tensors to be on the same device, but ", name, " got one of ", tensor.sizes(), " on the CPU");
      };
      if (value.isTensor()) note(value.toTensor());
      if (value.isTensorList())
        for (const Tensor& tensor : value.toTensorVector()) note(tensor);
      bool is_random = schema.arguments()[i].name() == "generator";
      if (is_random && (value.isNone() || value.toGenerator().device().type() == kind)) {
        const auto& generator = value.isNone() ? hooks.getDefaultGenerator(0) : value.toGenerator();
        auto numbers = ((Generator*)generator.unsafeGetGeneratorImpl())->numbers;
        (*stack)[stack->size() - arguments.size() + i] = numbers;
      }
    }
  }
  InKernel inside;
  at::native::cpu_fallback(operation, stack, /*error_on_views=*/true);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("unfold", at::native::unfold);
  m.impl("convolution_overrideable", convolution);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("resize_", resize_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("equal", equal);
  m.impl("set_", set_nothing);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage_at);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("record_stream", record_stream);
}

// Copies see to it themselves: torch would resolve what is conjugated or negated by copying it, again and again.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  auto counter = [&](const char* name, const size_t& value) {
    auto get = [&value] {
      Lock lock;
      return value;
    };
    m.def(name, get);
  };
  counter("allocated", allocated);
  counter("peak", peak);
  counter("ever", ever);
  counter("reserved", reserved);
  m.def("memory", [] {
    Lock lock;
    return std::make_pair(capacity - std::min(capacity, reserved + others), capacity);
  });
  m.def("resize", [](size_t nbytes, size_t of_others) {
    Lock lock;
    capacity = nbytes;
    others = of_others;
  });
  m.def("reset_peak", [] {
    Lock lock;
    peak = allocated;
  });
  m.def("default_generator", [] { return hooks.getDefaultGenerator(0); });
  m.def("refuse_page_locked", [](bool refuses) { refuses_page_locked = refuses; });
  m.def("take_races", [] {
    Lock lock;
    return std::exchange(races, {});
  });
  m.def("empty_cache", [] {
    Lock lock;
    give_back_cached();
  });
}
