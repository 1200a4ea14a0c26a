// A session's work: from a task to its reply.
#include <algorithm>
#include <set>

#include "base/files.h"
#include "base/hash.h"
#include "session/messages.h"
#include "session/session.h"

namespace corolla {
namespace {

constexpr uint64_t kMostHeader = 1 << 20;
constexpr uint64_t kMostCopies = 8;      // of an adapter, that a task may need
constexpr uint64_t kExtra = 1 << 20;     // bytes beside them

// The most tokens, up to those `wanted`, whose plan fits into `memory`; 0: none.
int fitting(const std::map<int, uint64_t>& planned, int64_t wanted, uint64_t memory) {
  int64_t best = 0;
  for (const auto& [tokens, bytes] : planned) {
    if (bytes > memory) break;
    best = tokens;
  }
  return static_cast<int>(std::min(best, wanted));
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

std::set<std::string> offered(const v1::Lease& lease) {
  std::set<std::string> names = {lease.task().sha256(), lease.payload().sha256()};
  for (const auto& blob : lease.cached()) names.insert(blob.sha256());
  return names;
}

// A gateway sends only groups that its task names, and no more than an adapter of this size needs.
void check_groups(const v1::Lease& lease, const v1::Task& task, int64_t parameters) {
  if (lease.cached_size() > kMaxCached) throw WireError("the lease has too many groups");
  std::map<std::string, std::string> named = {{"start", task.log().start()}};
  for (const auto& group : task.cached()) named[group.group()] = group.id();
  uint64_t most = kMostCopies * 4 * static_cast<uint64_t>(parameters) + kExtra;
  uint64_t sum = lease.payload().size();
  check_blob(lease.payload(), most);
  for (const auto& blob : lease.cached()) {
    check_id(blob.content());  // it becomes a file's name
    check_blob(blob, most);
    if (named[blob.group()] != blob.content())
      throw WireError("the task does not name the group " + one_line(blob.group()));
    sum += blob.size();
  }
  if (sum > most)
    throw WireError("the task has " + std::to_string(sum) + " bytes of groups, at most " +
                    std::to_string(most));
}

}  // namespace

v1::RetryWindow Session::serve(const v1::Lease& lease) {
  check_id(lease.id());
  if (!ends_with(lease.client(), "/" + owner_.device))
    throw WireError("the lease is of another device");
  Moment deadline = in_seconds(lease.deadline_seconds());
  v1::Policy policy = stricter(lease.policy(), owner_.limits);
  note_left(lease.id());
  auto today = spent_today(history_.read(unix_now()), unix_now());
  Channel& channel = caller_.channel();
  uint64_t up = channel.bytes_up();
  uint64_t down = channel.bytes_down() - lease.ByteSizeLong();  // what is small came with it
  Alive alive(channel, lease, policy, platform_, stop_, today, deadline);
  Begun begun;
  begun.lease = lease.id();
  auto spent = [&] {
    begun.work.seconds = alive.seconds_at_work();
    begun.work.bytes = static_cast<double>(channel.bytes_up() - up + channel.bytes_down() - down);
    begun.work.battery = alive.battery_spent();
  };
  drop_parts(owner_.state, offered(lease));
  Begun done;
  v1::Acknowledgement acknowledged;
  try {
    v1::Task task;
    std::string unread;
    try {
      task = read_task(fetch(lease.task(), kMaxTask, deadline));
    } catch (const WireError& error) {
      unread = std::string("the task cannot be read: ") + error.what();
    }
    begun.log = task.log().version();
    begun.header = given_up(task, lease.client(), "given up: the process ended before it was done");
    begun.work.run = task.run_id();
    begun.work.round = task.round();
    kept_.begin(begun);
    alive.keep_diary([&] {
      spent();
      keep(begun, "");
    });
    Answer answer = unread.empty() ? train(lease, task, alive, deadline)
                                   : Answer{given_up(task, lease.client(), unread), ""};
    spent();
    uint64_t reply = answer.payload.size() + answer.header.ByteSizeLong();
    begun.work.bytes += static_cast<double>(reply);
    auto& metrics = *answer.header.mutable_metrics();
    if (answer.header.error().empty()) {
      metrics["device_bytes_up"] = static_cast<double>(channel.bytes_up() - up + reply);
      metrics["device_bytes_down"] = static_cast<double>(channel.bytes_down() - down);
      metrics["device_battery_spent"] = alive.battery_spent();
      metrics["device_thermal_max"] = alive.thermal_max();
    }
    done = begun;
    done.header = answer.header;
    done.done = true;
    keep(done, answer.payload);
    if (answer.header.error().empty()) wait_unmetered(policy, alive);
    acknowledged = deliver(done, answer.payload, deadline);
  } catch (const Over& over) {
    spent();
    drop(begun, over.what());
    return retry_;
  } catch (...) {
    spent();
    interrupted(begun);
    throw;
  }
  return end(done, acknowledged);
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
  Assignment assignment = allowed(lease.assignment(), bundle->manifest);
  check_groups(lease, task, bundle->manifest.parameters());
  std::map<std::string, std::string> wanted;
  for (const auto& blob : lease.cached()) wanted[blob.group()] = blob.content();
  auto lacking = worker_->missing(task.run_id(), wanted);
  std::string payload = fetch(lease.payload(), kMaxPayload, deadline);
  std::vector<std::string> groups;
  for (const auto& blob : lease.cached())
    if (std::find(lacking.begin(), lacking.end(), blob.group()) != lacking.end())
      groups.push_back(fetch(blob, kMaxPayload, deadline));
  while (true) {
    alive.works();
    try {
      Answer answer = worker_->answer(lease.client(), task, payload, groups, assignment, alive);
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

// What the owner allows of it: no other method, and as many tokens as there is memory for.
Assignment Session::allowed(const v1::Assignment& told, const Manifest& manifest) const {
  const auto& methods = owner_.methods;
  if (std::find(methods.begin(), methods.end(), told.method()) == methods.end())
    throw WireError("this device does not train with " + one_line(told.method()));
  int64_t wanted = told.length() ? told.length() : manifest.length;
  if (owner_.length) wanted = std::min<int64_t>(wanted, owner_.length);
  int length = 0;
  try {
    length = fitting(manifest.program(told.program()).method(told.method()).planned, wanted, room_);
  } catch (const Error& error) {
    throw WireError(one_line(error.what()));
  }
  if (!length)
    throw WireError("this device has " + human_bytes(room_) + " of memory, too little for " +
                    one_line(told.program() + " with " + told.method()));
  return {told.kind(), told.program(), told.method(), static_cast<int>(told.rank()), length};
}

}  // namespace corolla
