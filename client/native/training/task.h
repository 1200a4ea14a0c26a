// The whole of a round on a device: from a task and a payload to the reply. No network here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "corolla/proto/update.pb.h"
#include "training/bundle.h"
#include "training/conditions.h"
#include "training/data.h"

namespace corolla {

// What a gateway told a native client to run: see Assignment of proto/device.proto.
struct Assignment {
  std::string kind, program, method;
  int rank = 0;
  int length = 0;
};

// The header is complete, with the size and the sha256 of the payload.
struct Answer {
  v1::Reply header;
  std::string payload;
};

class Trainer {
 public:
  // `state` is the folder of what outlives the process: cached groups, the log, a checkpoint.
  Trainer(const Manifest& manifest, std::filesystem::path bundle, Data data,
          std::filesystem::path state);

  uint64_t examples() const;

  // Of the cached groups of a run (group -> content id) those that are not held here.
  std::vector<std::string> missing(const std::string& run,
                                   const std::map<std::string, std::string>& groups);

  // The reply to a task whose missing groups are in its payload (see with_groups). A task that
  // cannot be done is an error in the reply. Throws Lapsed, after writing a checkpoint, when
  // conditions lapse: the same call goes on from there, with the same bits.
  Answer answer(const std::string& client, const v1::Task& task, const std::string& payload,
                const Assignment& assignment, Conditions& conditions);

 private:
  void train(const v1::Task& task, const std::string& payload, const Assignment& assignment,
             Conditions& conditions, Answer& answer);

  Manifest manifest_;
  std::filesystem::path bundle_;
  Data data_;
  std::filesystem::path state_;
};

// One payload of a task's own and of cached groups that were fetched. With groups, payload_bytes
// and payload_sha256 of the task are set anew. Throws Error when one of them cannot be read.
std::string with_groups(v1::Task& task, const std::string& payload,
                        const std::vector<std::string>& groups);

}  // namespace corolla
