// A device's half of proto/device.proto: it dials in, trains when asked, reports, comes back.
//
// It survives whatever ends a call or the process: a network that is cut, a gateway that starts
// again, a kill. A reply that was not yet delivered waits on disk; a session that was begun and not
// ended is reported as given up.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "session/alive.h"
#include "session/channel.h"
#include "session/delivery.h"
#include "session/disk.h"
#include "session/download.h"
#include "session/history.h"
#include "session/timings.h"
#include "training/task.h"

namespace corolla {

// What trains, on the programs of one bundle.
class Worker {
 public:
  virtual ~Worker() = default;

  // Of the cached groups of a run (group -> content id) those that are not held here.
  virtual std::vector<std::string> missing(const std::string& run,
                                           const std::map<std::string, std::string>& groups) = 0;

  // As Trainer::answer, with what was missing in buffers of their own.
  virtual Answer answer(const std::string& client, const v1::Task& task, const std::string& payload,
                        const std::vector<std::string>& groups, const Assignment& assignment,
                        Conditions& conditions) = 0;
};

using Hire = std::function<std::unique_ptr<Worker>(const Bundle&)>;

// What a device is and its owner decides.
struct Owner {
  std::string device;
  std::filesystem::path state, publisher;
  uint64_t examples = 0;
  uint64_t memory = 0;  // bytes that may be used; 0: what is free
  std::vector<std::string> methods, strategies;
  uint32_t length = 0;  // tokens of a sequence, at most; 0: as the program
  std::string runtime;  // "executorch 1.5.1"
  v1::Policy limits;    // the owner's own
  DiskLimits disk;
  bool keep_updates = false;
};

// Told what its owner may want to know, a line each, nothing twice in a row.
using Say = std::function<void(const std::string&)>;

class Session {
 public:
  Session(Owner owner, Channel& channel, Pauses pauses, Platform& platform, Hire hire, Stop& stop,
          Say say);

  // Serves until `rounds` updates were accepted (0: for ever), or for one check-in. Throws
  // UsageError for what only the owner can mend, Stopped when told to end; with `once`, Error for a
  // bundle that is refused.
  void run(uint64_t rounds, bool once);

 private:
  struct Service;

  double visit();  // seconds until the next
  double check_in();
  void note_visits();
  double get_bundle(const v1::Refusal& refusal);
  v1::CheckInRequest request();
  v1::RetryWindow serve(const v1::Lease& lease);
  Answer begin(Service& service);
  Answer train(const v1::Task& task, Service& service);
  Answer work(const v1::Task& task, Service& service);
  Assignment allowed(const v1::Assignment& told, const Manifest& manifest) const;
  void give_up(Service& service, const Over& over);
  void wait_unmetered(const Service& service);
  void make_room(const v1::Lease& lease, const v1::Task& task, int64_t parameters) const;

  std::string fetch(const v1::Blob& blob, uint64_t most, Moment deadline);
  v1::Chunk download(const v1::DownloadRequest& request, uint64_t size, Moment deadline);
  v1::Policy policy() const;
  void learn(const v1::CheckInResponse& found);
  double pause(const v1::RetryWindow& window);
  void tell(const std::string& line);

  Owner owner_;
  Caller caller_;
  Platform& platform_;
  Hire hire_;
  Stop& stop_;
  Say say_;
  Disk disk_;
  Bundles bundles_;
  History history_;
  Delivery delivery_;
  Timings timings_;
  std::unique_ptr<Worker> worker_;
  std::string hired_for_;  // name of the bundle that the worker has
  v1::RetryWindow retry_;  // the gateway's last word
  uint64_t room_ = 0;      // bytes of memory, as it was told to the gateway
  std::string told_, refused_;
};

}  // namespace corolla
