#include "session/session.h"

#include <algorithm>
#include <system_error>
#include <thread>

#include "base/files.h"
#include "base/hash.h"
#include "session/messages.h"

namespace corolla {
namespace {

constexpr double kUsual = 30, kDay = 86400;  // seconds
constexpr double kPatience = 20;  // seconds of the one visit for which a call is tried again
constexpr uint64_t kMostExamples = 1 << 30;
constexpr double kVisits = 1 << 16;  // bytes without a lease that make an entry of the history

}  // namespace

Session::Session(Owner owner, Channel& channel, Pauses pauses, Platform& platform, Hire hire,
                 Stop& stop, Say say)
    : owner_(std::move(owner)),
      caller_(channel, pauses, stop, [this](const std::string& line) { tell(line); }),
      platform_(platform),
      hire_(std::move(hire)),
      stop_(stop),
      say_(std::move(say)),
      disk_(owner_.state, owner_.disk),
      bundles_(owner_.state, owner_.publisher, disk_),
      history_(owner_.state / "history.jsonl"),
      delivery_(owner_.state, owner_.keep_updates, caller_, history_,
                [this](const std::string& line) { tell(line); }),
      timings_(owner_.state / "timings") {}

void Session::run(uint64_t rounds, bool once) {
  try {
    if (once) caller_.be_patient_for(kPatience);
    while (!rounds || delivery_.accepted() < rounds) {
      refused_.clear();
      double pause = visit();
      if (once && !refused_.empty()) throw Error(refused_);
      if (once) break;
      if (!rounds || delivery_.accepted() < rounds) stop_.wait(pause);
    }
  } catch (...) {
    note_visits();
    throw;
  }
  note_visits();
}

double Session::visit() {
  try {
    Spending& spending = caller_.spending();
    Working visit(spending);
    spending.limit(policy(), spent_today(history_.read(unix_now()), unix_now()));
    bool metered = policy().unmetered() && platform_.read().metered;
    if (delivery_.deliver_left(metered, retry_)) {
      spending.settle();
      return pause(retry_);
    }
    Lacks lacks = before_check_in(policy(), platform_.read(), owner_.examples, spending.total());
    if (lacks.empty()) return check_in();
    tell("waiting: " + in_words(lacks));
    return retry_.max_seconds() > 0 ? pause(retry_) : kUsual;
  } catch (const UsedUp& over) {  // or as good as: the next visit would come no further
    tell(std::string("waiting: ") + over.what());
  } catch (const DiskError& error) {
    tell(std::string("this device fails: ") + error.what());
  } catch (const std::filesystem::filesystem_error& error) {
    tell(std::string("this device fails: ") + error.code().message());
  } catch (const Over& over) {
    refused_ = std::string("the gateway does not answer: ") + over.what();
    tell(std::string("the gateway refuses: ") + over.what());
  } catch (const std::bad_alloc&) {
    tell("this device fails: there is too little memory");
  }
  return caller_.pauses().longest;
}

double Session::check_in() {
  v1::CheckInResponse found;
  try {
    found = caller_.call(&Channel::Stub::CheckIn, request());
  } catch (const WireError& error) {
    refused_ = std::string("the gateway sends what cannot be read: ") + error.what();
    tell(refused_);
    return caller_.pauses().longest;
  }
  learn(found);
  delivery_.report_left(found.lease().id());
  if (found.has_lease()) {
    try {
      retry_ = serve(found.lease());
    } catch (const WireError& error) {
      tell(std::string("the gateway sends what cannot be read: ") + error.what());
    }
    return pause(retry_);
  }
  const v1::Refusal& refusal = found.refusal();
  std::string text = one_line(refusal.text());
  if (refusal.reason() == v1::Refusal::REASON_PROTOCOL)
    throw UsageError("the gateway refuses: " + text);
  if (refusal.reason() == v1::Refusal::REASON_MODEL && refusal.base_model().size())
    return get_bundle(refusal);
  tell("waiting: " + text);
  if (caller_.spending().spent().bytes >= kVisits) note_visits();
  bool for_long = refusal.reason() == v1::Refusal::REASON_NAME ||  // until its holder is forgotten
                  refusal.reason() == v1::Refusal::REASON_MODEL;
  return for_long ? caller_.pauses().longest : pause(retry_);
}

v1::CheckInRequest Session::request() {
  const Bundle* bundle = bundles_.current();
  Readings now = platform_.read();
  v1::CheckInRequest request;
  request.set_protocol(kProtocol);
  request.set_device(owner_.device);
  request.set_num_examples(std::min(owner_.examples, kMostExamples));
  request.set_manifest(bundle ? bundle->name : "");
  auto version = read_file(owner_.state / "version").value_or("");
  request.set_log_version(is_hex(version, 32) ? version : "");
  auto& able = *request.mutable_capabilities();  // not how full the battery is: nobody needs it
  room_ = owner_.memory ? std::min(owner_.memory, now.memory_bytes) : now.memory_bytes;
  able.set_memory_bytes(room_);
  able.set_cores(std::max(1U, std::thread::hardware_concurrency()));
  able.set_accelerator("cpu");
  able.set_runtime(owner_.runtime);
  able.set_charging(now.charging);
  able.set_metered(now.metered);
  able.set_idle(now.idle);
  auto& native = *request.mutable_native();
  for (const auto& method : owner_.methods) native.add_methods(method);
  for (const auto& strategy : owner_.strategies) native.add_strategies(strategy);
  native.set_signs(kSignsVersion);
  native.set_runtime(owner_.runtime);
  native.set_length(owner_.length);
  timings_.tell(native);
  return request;
}

// What is asked of devices is known from now on, also to the next process.
void Session::learn(const v1::CheckInResponse& found) {
  retry_ = found.retry();
  const v1::Policy& told = found.has_policy() ? found.policy() : found.lease().policy();
  if (!found.has_policy() && !found.lease().has_policy()) return;
  std::string data = told.SerializeAsString();
  if (read_file(owner_.state / "policy").value_or("?") != data)
    write_file(owner_.state / "policy", data);
}

v1::Policy Session::policy() const {
  v1::Policy told;
  auto data = read_file(owner_.state / "policy");
  if (!data || !told.ParseFromString(*data)) told.Clear();
  return stricter(told, owner_.limits);
}

// What was spent without a lease counts as well.
void Session::note_visits() {
  Spent spent = caller_.spending().spent();
  if (!(spent.bytes > 0)) return;
  Contribution work;
  work.at = unix_now();
  work.bytes = spent.bytes;
  work.seconds = spent.seconds;
  history_.add(work);
  caller_.spending().settle();
}

double Session::get_bundle(const v1::Refusal& refusal) {
  worker_.reset();  // the old programs go before the new ones come
  try {
    auto get = [this](const v1::DownloadRequest& request, uint64_t size) {
      return download(request, size, kForever);
    };
    const Bundle& bundle =
        bundles_.fetch(refusal.base_model(), get, platform_.read().storage_bytes);
    tell("bundle " + bundle.name.substr(0, 12) + " of " + one_line(bundle.manifest.model) +
         " is here");
    note_visits();
    return caller_.least_pause();
  } catch (const UsedUp&) {
    note_visits();
    throw;
  } catch (const NoAnswer&) {
    note_visits();
    throw;
  } catch (const Over&) {  // not offered any more
    note_visits();
    return caller_.least_pause();
  } catch (const DiskError&) {
    note_visits();
    throw;
  } catch (const Stopped&) {
    throw;
  } catch (const UsageError&) {
    throw;
  } catch (const Error& error) {
    note_visits();
    refused_ = std::string("the gateway's bundle is refused: ") + error.what();
    tell(refused_);
    return caller_.pauses().longest;
  }
}

std::string Session::fetch(const v1::Blob& blob, uint64_t most, Moment deadline) {
  auto get = [&](const v1::DownloadRequest& request, uint64_t size) {
    return download(request, size, deadline);
  };
  return corolla::fetch(blob, owner_.state, get, most);
}

v1::Chunk Session::download(const v1::DownloadRequest& request, uint64_t size, Moment deadline) {
  return caller_.call(&Channel::Stub::Download, request, deadline, false, size);
}

// A moment of one's own choice within the window; not at once, and at most a day, whatever the
// other side says.
double Session::pause(const v1::RetryWindow& window) {
  double low = window.min_seconds(), high = window.max_seconds();
  bool sound = 0 <= low && low <= high && high <= kDay;
  double chosen = sound ? caller_.jitter(low, high) : caller_.jitter(kUsual / 2, kUsual);
  return std::max(caller_.least_pause(), chosen);
}

void Session::tell(const std::string& line) {
  if (line == told_) return;
  told_ = line;
  say_(line);
}

}  // namespace corolla
