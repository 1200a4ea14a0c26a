#include "training/engine.h"

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/core/hierarchical_allocator.h>
#include <executorch/runtime/platform/platform.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>

#include "base/error.h"

// Of a library that comes without this header.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace corolla {
namespace {

namespace et = executorch::extension;
using executorch::aten::ScalarType;
using executorch::runtime::EValue;
using Bytes = executorch::runtime::Span<uint8_t>;

std::string version_hint(executorch::runtime::Error error) {
  return "runtime error " + std::to_string(static_cast<int>(error)) +
         ": get the bundle again, or another version of the client";
}

// Memory that costs nothing before it is touched: an arena is planned for the longest sequence, and
// most are shorter.
class Arena {
 public:
  explicit Arena(size_t bytes) : bytes_(std::max<size_t>(bytes, 1)) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Arena() {
    if (data_ != MAP_FAILED) munmap(data_, bytes_);
  }
  Arena(Arena&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
    other.data_ = MAP_FAILED;
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  Arena& operator=(Arena&&) = delete;

  Bytes span() const { return {static_cast<uint8_t*>(data_), bytes_}; }

 private:
  void* data_;
  size_t bytes_;
};

// The runtime would write lines of its own on the terminal, of what Error says in one.
void silence() {
  static const bool done = executorch::runtime::register_pal(
      executorch::runtime::PalImpl::create([](auto...) {}, __FILE__));
  static_cast<void>(done);
}

struct Input {
  std::vector<int> shape;
  size_t offset, size;
};

}  // namespace

struct Engine::Loaded {
  std::string method;
  std::vector<Input> inputs;
  std::vector<Arena> arenas;
  std::vector<Bytes> spans;
  std::unique_ptr<executorch::runtime::HierarchicalAllocator> planned;
  std::unique_ptr<et::Module> module;  // last: it goes first
  std::vector<int64_t> ids, labels;

  std::vector<EValue> run(const View& view, const std::vector<float>& shown) {
    const auto length = static_cast<int>(view.length);
    const Sequence& own = *view.sequence;
    ids.assign(own.ids.begin(), own.ids.begin() + length);
    labels.assign(own.labels.begin(), own.labels.begin() + length);
    std::vector<et::TensorPtr> held;
    held.push_back(et::from_blob(ids.data(), {1, length}, ScalarType::Long));
    held.push_back(et::from_blob(labels.data(), {1, length}, ScalarType::Long));
    for (const Input& input : inputs)
      held.push_back(et::from_blob(const_cast<float*>(shown.data()) + input.offset, input.shape,
                                   ScalarType::Float));
    std::vector<EValue> values;
    for (const et::TensorPtr& tensor : held) values.emplace_back(*tensor);
    auto result = module->execute(method, values);
    if (!result.ok())
      throw Error("program failed at " + std::to_string(length) + " tokens: " +
                  version_hint(result.error()));
    return std::move(*result);
  }

  double loss_of(const std::vector<EValue>& outputs) const {
    if (outputs.empty() || !outputs[0].isTensor() || outputs[0].toTensor().numel() != 1 ||
        outputs[0].toTensor().scalar_type() != ScalarType::Float)
      throw Error("the program does not answer with a loss");
    return *outputs[0].toTensor().const_data_ptr<float>();
  }
};

Engine::Engine(const Manifest& manifest, const std::filesystem::path& bundle,
               const std::string& program, const std::string& method, int threads)
    : loaded_(std::make_unique<Loaded>()) {
  silence();
  const Program& own = manifest.program(program);
  const std::string name = own.method(method).file, data = own.data();
  const std::string file = (bundle / name).string();
  if (auto* pool = et::threadpool::get_threadpool())
    pool->_unsafe_reset_threadpool(static_cast<uint32_t>(std::max(threads, 1)));
  Loaded& loaded = *loaded_;
  loaded.method = method;
  size_t at = 0;
  for (const AdapterTensor& tensor : manifest.adapter) {
    const auto count = static_cast<size_t>(tensor.size());
    loaded.inputs.push_back({{tensor.shape.begin(), tensor.shape.end()}, at, count});
    at += count;
  }
  constexpr auto mode = et::Module::LoadMode::Mmap;
  if (data.empty())
    loaded.module = std::make_unique<et::Module>(file, mode);
  else
    loaded.module = std::make_unique<et::Module>(file, (bundle / data).string(), mode);
  const auto meta = loaded.module->method_meta(method);
  if (!meta.ok()) throw Error("cannot load " + name + ": " + version_hint(meta.error()));
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); i++)
    loaded.arenas.emplace_back(static_cast<size_t>(meta->memory_planned_buffer_size(i).get()));
  for (const Arena& arena : loaded.arenas) loaded.spans.push_back(arena.span());
  loaded.planned = std::make_unique<executorch::runtime::HierarchicalAllocator>(
      executorch::runtime::Span<Bytes>(loaded.spans.data(), loaded.spans.size()));
  const auto error = loaded.module->load_method(method, loaded.planned.get());
  if (error != executorch::runtime::Error::Ok)
    throw Error("cannot load " + method + " of " + name + ": " + version_hint(error));
}

Engine::~Engine() = default;

double Engine::loss(const View& view, const std::vector<float>& shown) {
  return loaded_->loss_of(loaded_->run(view, shown));
}

double Engine::gradient(const View& view, const std::vector<float>& shown,
                        std::vector<float>& sum) {
  const auto outputs = loaded_->run(view, shown);
  if (outputs.size() != 1 + loaded_->inputs.size())
    throw Error("the program does not answer with a gradient for each tensor");
  for (size_t i = 0; i < loaded_->inputs.size(); i++) {
    const Input& input = loaded_->inputs[i];
    const auto& tensor = outputs[i + 1].toTensor();
    if (static_cast<size_t>(tensor.numel()) != input.size ||
        tensor.scalar_type() != ScalarType::Float)
      throw Error("the program answers with a gradient of another shape");
    const float* values = tensor.const_data_ptr<float>();
    for (size_t j = 0; j < input.size; j++) sum[input.offset + j] += values[j];
  }
  return loaded_->loss_of(outputs);
}

}  // namespace corolla
