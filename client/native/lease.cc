// A session's work: a task, its reply, and the end of both.
#include <algorithm>
#include <set>

#include "files.h"
#include "hash.h"
#include "messages.h"
#include "session.h"

namespace corolla {
namespace {

constexpr uint64_t kSmallest = 1 << 16;  // bytes of a chunk on the slowest line
constexpr uint64_t kMostHeader = 1 << 20;
constexpr int kMostStuck = 10;
constexpr std::chrono::seconds kLastMinute{60};  // for a report after the deadline

Assignment plain(const v1::Assignment& told, uint32_t most) {
  Assignment own{told.kind(), told.program(), told.method(), static_cast<int>(told.rank()),
                 static_cast<int>(told.length())};
  int limit = static_cast<int>(most);
  if (limit && (!own.length || own.length > limit)) own.length = limit;
  return own;
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// Of downloads that nobody goes on with.
void drop_parts(const std::filesystem::path& state, const v1::Lease& lease) {
  std::set<std::string> offered = {lease.task().sha256(), lease.payload().sha256()};
  for (const auto& blob : lease.cached()) offered.insert(blob.sha256());
  std::vector<std::filesystem::path> old;
  for (const auto& entry : std::filesystem::directory_iterator(state))
    if (entry.path().extension() == ".part" && !offered.count(entry.path().stem().string()))
      old.push_back(entry.path());
  for (const auto& path : old) std::filesystem::remove(path);
}

}  // namespace

v1::RetryWindow Session::serve(const v1::Lease& lease) {
  check_id(lease.id());
  if (!ends_with(lease.client(), "/" + owner_.device))
    throw WireError("the lease is of another device");
  Moment deadline = in_seconds(lease.deadline_seconds());
  auto spent = spent_today(history_.read(unix_now()), unix_now());
  Channel& channel = caller_.channel();
  uint64_t up = channel.bytes_up();
  uint64_t down = channel.bytes_down() - lease.ByteSizeLong();  // what is small came with it
  Alive alive(channel, lease, stricter(lease.policy(), owner_.limits), platform_, stop_, spent,
              deadline);
  Begun begun;
  begun.lease = lease.id();
  drop_parts(owner_.state, lease);
  try {
    v1::Task task = read_task(fetch(lease.task(), kMaxTask, deadline));
    begun.log = task.log().version();
    begun.header = given_up(task, lease.client(), "given up: the process ended before it was done");
    begun.work.run = task.run_id();
    begun.work.round = task.round();
    kept_.begin(begun);
    Answer answer = train(lease, task, alive, deadline);
    up = channel.bytes_up() - up + answer.payload.size() + answer.header.ByteSizeLong();
    down = channel.bytes_down() - down;
    auto& metrics = *answer.header.mutable_metrics();
    if (answer.header.error().empty()) {
      metrics["device_bytes_up"] = static_cast<double>(up);
      metrics["device_bytes_down"] = static_cast<double>(down);
      metrics["device_battery_spent"] = alive.battery_spent();
      metrics["device_thermal_max"] = alive.thermal_max();
    }
    begun.header = answer.header;
    begun.work.seconds = alive.seconds_at_work();
    begun.work.bytes = static_cast<double>(up + down);
    begun.work.battery = alive.battery_spent();
    begun.done = true;
    kept_.finish(begun, answer.payload);
    return end(begun, deliver(begun, answer.payload, deadline));
  } catch (const Over& over) {
    drop(begun, over.what());
    return retry_;
  }
}

// The reply of who trains, or one that says why there is none.
Answer Session::train(const v1::Lease& lease, const v1::Task& task, Alive& alive, Moment deadline) {
  std::string why;
  try {
    Lacks soon = with_lease(stricter(lease.policy(), owner_.limits), history_.read(unix_now()),
                            task.run_id(), task.round(), unix_now());
    if (!soon.empty()) return {given_up(task, lease.client(), "policy: " + in_words(soon)), ""};
    Answer answer = work(lease, task, alive, deadline);
    if (answer.payload.size() > lease.max_upload_bytes())
      why = "the update is larger than is taken";
    else if (answer.header.ByteSizeLong() > kMostHeader)
      why = "the header of the update is larger than is taken";
    else
      return answer;
  } catch (const Stopped&) {
    throw;
  } catch (const UsageError&) {
    throw;
  } catch (const Lapsed& lapsed) {
    why = std::string("given up: ") + lapsed.what();
  } catch (const WireError& error) {
    why = error.what();
  } catch (const Over& over) {
    why = std::string("given up: ") + over.what();
  } catch (const std::exception& error) {  // may name a file or quote data: for the owner alone
    tell(std::string("this device fails: ") + one_line(error.what()));
    why = "this device fails";
  }
  return {given_up(task, lease.client(), why), ""};
}

// Fetches what the task lacks and trains, with rests while conditions do not hold.
Answer Session::work(const v1::Lease& lease, const v1::Task& task, Alive& alive, Moment deadline) {
  const Bundle* bundle = bundles_.current();
  if (!bundle) throw WireError("the bundle of this device is not whole any more");
  if (!worker_ || hired_for_ != bundle->name) worker_ = hire_(*bundle);
  hired_for_ = bundle->name;
  std::map<std::string, std::string> wanted;
  for (const auto& blob : lease.cached()) {
    check_id(blob.content());  // it becomes a file's name
    wanted[blob.group()] = blob.content();
  }
  auto lacking = worker_->missing(task.run_id(), wanted);
  std::string payload = fetch(lease.payload(), kMaxPayload, deadline);
  std::vector<std::string> groups;
  for (const auto& blob : lease.cached())
    if (std::find(lacking.begin(), lacking.end(), blob.group()) != lacking.end())
      groups.push_back(fetch(blob, kMaxPayload, deadline));
  while (true) {
    alive.works();
    try {
      Answer answer = worker_->answer(lease.client(), task, payload, groups,
                                      plain(lease.assignment(), owner_.length), alive);
      alive.rests();
      if (alive.pass_seconds() > 0) timings_.note(lease.assignment(), alive.pass_seconds());
      return answer;
    } catch (const Lapsed& lapsed) {
      alive.rests();
      stop_.check();
      if (!alive.can_come_back()) throw;
      tell(std::string("waiting: ") + lapsed.what());
      if (!alive.comes_back()) throw;
      tell("going on");
    } catch (...) {
      alive.rests();
      throw;
    }
  }
}

// Uploads and reports, until there is an answer or the round is long over.
v1::Acknowledgement Session::deliver(const Begun& begun, const std::string& payload,
                                     Moment deadline) {
  uint64_t size = payload.size(), at = 0, most = kChunk;
  int stuck = 0;
  while (at < size) {
    auto chunk = make_chunk(payload.substr(at, most), at, size, begun.lease);
    v1::UploadStatus status;
    try {
      status = caller_.call(&Channel::Stub::Upload, chunk, deadline, most > kSmallest);
    } catch (const Slow&) {
      most /= 2;
      continue;
    }
    if (!status.problem().empty()) throw Over(one_line(status.problem()));
    stuck = status.received() <= at ? stuck + 1 : 0;
    if (status.received() > size || stuck > kMostStuck)
      throw Over("the gateway does not take the update in");
    at = status.received();
  }
  v1::ReportRequest request;
  request.set_lease(begun.lease);
  request.set_reply(begun.header.SerializeAsString());
  Moment last = deadline == kForever ? kForever : deadline + kLastMinute;
  return caller_.call(&Channel::Stub::Report, request, last);
}

// The gateway's last word on a reply.
v1::RetryWindow Session::end(const Begun& begun, const v1::Acknowledgement& answer) {
  Contribution work = begun.work;
  work.at = unix_now();
  work.accepted = answer.accepted() && begun.header.error().empty();
  history_.add(work);
  kept_.clear();
  if (work.accepted) ++done_;
  if (work.accepted && is_hex(begun.log, 32)) write_file(owner_.state / "version", begun.log);
  if (!answer.accepted() && begun.header.missing_size()) {  // this device has forgotten something
    std::error_code absent;
    std::filesystem::remove(owner_.state / "version", absent);
  }
  tell("round " + std::to_string(work.round) + " as " + one_line(begun.header.client()) + ": " +
       (answer.accepted() ? "accepted" : "not accepted: " + one_line(answer.why())));
  return answer.retry();
}

void Session::drop(const Begun& begun, const std::string& why) {
  if (begun.work.seconds > 0 || begun.work.bytes > 0) {
    Contribution work = begun.work;
    work.at = unix_now();
    history_.add(work);
  }
  kept_.clear();
  tell("dropped: " + why);
}

// Of a process that died since. Without a connection it waits on: nothing else can be done either.
bool Session::deliver_kept() {
  auto begun = kept_.begun();
  bool metered = policy().unmetered() && platform_.read().metered;
  if (!begun || !begun->done || metered) return false;
  try {
    retry_ = end(*begun, deliver(*begun, kept_.payload(), kForever));
  } catch (const Over& over) {
    drop(*begun, over.what());
  }
  return true;
}

// A session that was begun by a process that died, and that is not the one to go on with now.
void Session::report_left(const std::string& lease) {
  auto begun = kept_.begun();
  if (!begun || begun->lease == lease) return;
  try {
    end(*begun, deliver(*begun, "", kForever));
  } catch (const Over& over) {
    drop(*begun, over.what());
  }
}

}  // namespace corolla
