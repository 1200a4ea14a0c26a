// A session's work: from a task to its reply.
#include <algorithm>
#include <set>

#include "base/files.h"
#include "session/messages.h"
#include "session/session.h"

namespace corolla {
namespace {

constexpr uint64_t kMostHeader = 1 << 20;
constexpr uint64_t kMostCopies = 8;      // of an adapter, that a task may need
constexpr uint64_t kOwnCopies = 6;       // that training keeps: log, checkpoint with AdamW's, reply
constexpr uint64_t kExtra = 1 << 20;     // bytes beside them
constexpr double kLook = 0.5;            // seconds between two looks at the network

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

// Traffic of a lease, from its check-in on: what is small came with the answer to that.
class Traffic {
 public:
  Traffic(const Channel& channel, const v1::Lease& lease)
      : channel_(channel),
        up_(channel.bytes_up()),
        down_(channel.bytes_down() - lease.ByteSizeLong()) {}

  uint64_t up() const { return channel_.bytes_up() - up_; }
  uint64_t down() const { return channel_.bytes_down() - down_; }

 private:
  const Channel& channel_;
  uint64_t up_, down_;
};

}  // namespace

// A lease while it is served. `today`: what the device had spent before.
struct Session::Service {
  Service(const Session& own, Caller& caller, const v1::Lease& lease, Spent today)
      : lease(lease),
        deadline(in_seconds(lease.deadline_seconds())),
        policy(stricter(lease.policy(), own.owner_.limits)),
        traffic(caller.channel(), lease),
        spending(caller.spending()),
        alive(caller.channel(), lease, policy, own.platform_, own.stop_, spending, deadline) {
    begun.lease = lease.id();
    spending.limit(policy, today);
  }

  ~Service() { spending.settle(); }

  // Notes what the work has cost so far.
  void charge() {
    Spent spent = spending.spent();
    begun.work.seconds = spent.seconds;
    begun.work.bytes = spent.bytes;
    begun.work.battery = alive.battery_spent();
  }

  // The record of a reply, whose header is told what it has cost.
  Begun finished(Answer& answer) {
    charge();
    uint64_t reply = answer.payload.size() + answer.header.ByteSizeLong();
    begun.work.bytes += static_cast<double>(reply);
    if (answer.header.error().empty()) {
      auto& metrics = *answer.header.mutable_metrics();
      metrics["device_bytes_up"] = static_cast<double>(traffic.up() + reply);
      metrics["device_bytes_down"] = static_cast<double>(traffic.down());
      metrics["device_battery_spent"] = alive.battery_spent();
      metrics["device_thermal_max"] = alive.thermal_max();
    }
    Begun done = begun;
    done.header = answer.header;
    done.done = true;
    return done;
  }

  const v1::Lease& lease;
  Moment deadline;
  v1::Policy policy;
  Traffic traffic;
  Spending& spending;
  Alive alive;
  Begun begun;
};

v1::RetryWindow Session::serve(const v1::Lease& lease) {
  check_id(lease.id());
  if (!ends_with(lease.client(), "/" + owner_.device))
    throw WireError("the lease is of another device");
  delivery_.count_left(lease.id());
  Spent today = spent_today(history_.read(unix_now()), unix_now());
  Service service(*this, caller_, lease, today);
  drop_parts(owner_.state, offered(lease));
  Begun done;
  v1::Acknowledgement acknowledged;
  try {
    Answer answer = begin(service);
    done = service.finished(answer);
    delivery_.keep(done, answer.payload);
    if (answer.header.error().empty()) wait_unmetered(service);
    acknowledged = delivery_.deliver(done, answer.payload, service.deadline);
    service.charge();  // with what an upload cost that was asked for twice
    done.work = service.begun.work;
  } catch (const Over& over) {
    bool used_up = dynamic_cast<const UsedUp*>(&over) != nullptr;
    if (used_up) give_up(service, over);
    service.charge();
    delivery_.drop(service.begun, over.what());
    if (used_up) throw;
    return retry_;
  } catch (...) {
    service.charge();
    delivery_.interrupted(service.begun);
    throw;
  }
  return delivery_.end(done, acknowledged);
}

// Tells the gateway that it need not wait.
void Session::give_up(Service& service, const Over& over) {
  v1::ReportRequest request;
  service.begun.header.set_error(std::string("given up: ") + over.what());
  request.set_lease(service.begun.lease);
  request.set_reply(service.begun.header.SerializeAsString());
  try {
    caller_.last_word(&Channel::Stub::Report, request);
  } catch (const Over&) {
  }
}

// Reads the task, keeps on disk that it was begun, and has it done.
Answer Session::begin(Service& service) {
  const v1::Lease& lease = service.lease;
  v1::Task task;
  std::string unread;
  try {
    task = read_task(fetch(lease.task(), kMaxTask, service.deadline));
  } catch (const WireError& error) {
    unread = std::string("the task cannot be read: ") + error.what();
  }
  Begun& begun = service.begun;
  begun.log = task.log().version();
  begun.header = given_up(task, lease.client(), "given up: the process ended before it was done");
  begun.work.run = task.run_id();
  begun.work.round = task.round();
  delivery_.begin(begun);
  service.alive.keep_diary([this, &service] {
    service.charge();
    delivery_.keep(service.begun, "");
  });
  if (!unread.empty()) return {given_up(task, lease.client(), unread), ""};
  return train(task, service);
}

// The reply of the worker, or one that says why there is none.
Answer Session::train(const v1::Task& task, Service& service) {
  const v1::Lease& lease = service.lease;
  std::string why;
  try {
    Lacks soon = with_lease(service.policy, history_.read(unix_now()), task.run_id(), task.round(),
                            unix_now());
    if (!soon.empty()) return {given_up(task, lease.client(), "policy: " + in_words(soon)), ""};
    Answer answer = work(task, service);
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
  } catch (const UsedUp&) {  // the next task would come no further
    throw;
  } catch (const WireError& error) {
    why = error.what();
  } catch (const Over& over) {
    why = std::string("given up: ") + over.what();
  } catch (const DiskLimit& limit) {
    why = limit.what();
    tell(why);
  } catch (const std::exception& error) {  // may name a file or quote data: for the owner alone
    tell(std::string("this device fails: ") + one_line(error.what()));
    why = "this device fails";
  }
  return {given_up(task, lease.client(), why), ""};
}

// Fetches what the task lacks and trains, with rests while conditions do not hold.
Answer Session::work(const v1::Task& task, Service& service) {
  const v1::Lease& lease = service.lease;
  Alive& alive = service.alive;
  const Bundle* bundle = bundles_.current();
  if (!bundle) throw WireError("the bundle of this device is not whole any more");
  if (!worker_ || hired_for_ != bundle->name) worker_ = hire_(*bundle);
  hired_for_ = bundle->name;
  Assignment assignment = allowed(lease.assignment(), bundle->manifest);
  check_groups(lease, task, bundle->manifest.parameters());
  make_room(lease, task, bundle->manifest.parameters());
  std::map<std::string, std::string> wanted;
  for (const auto& blob : lease.cached()) wanted[blob.group()] = blob.content();
  auto lacking = worker_->missing(task.run_id(), wanted);
  std::string payload = fetch(lease.payload(), kMaxPayload, service.deadline);
  std::vector<std::string> groups;
  for (const auto& blob : lease.cached())
    if (std::find(lacking.begin(), lacking.end(), blob.group()) != lacking.end())
      groups.push_back(fetch(blob, kMaxPayload, service.deadline));
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

// Throws DiskLimit for a task whose run would keep too much of the owner's disk.
void Session::make_room(const v1::Lease& lease, const v1::Task& task, int64_t parameters) const {
  Groups named;
  for (const auto& group : task.cached()) named[group.group()] = group.id();
  uint64_t coming = kOwnCopies * 4 * static_cast<uint64_t>(parameters) + lease.payload().size();
  for (const auto& blob : lease.cached())
    if (!disk_.holds(task.run_id(), blob.content())) coming += blob.size();
  disk_.admit(task.run_id(), named, coming);
}

// Heartbeats go on meanwhile, as long as the day allows. Throws Over when the result is not wanted
// any more, or nothing is left to deliver it with.
void Session::wait_unmetered(const Service& service) {
  Resting wait(service.spending);
  while (service.policy.unmetered() && platform_.read().metered) {
    tell("waiting: not on an unmetered network");
    service.spending.ask(0);
    stop_.wait(kLook);
    if (auto why = service.alive.ended(); !why.empty()) throw Over(why);
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
