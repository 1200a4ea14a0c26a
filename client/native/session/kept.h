// What a session leaves on disk, so that it has an end also when its process has none.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "corolla/proto/update.pb.h"
#include "session/history.h"

namespace corolla {

// A session that was begun. `header` is what is reported of it: until it is done, that it was given
// up.
struct Begun {
  std::string lease;
  std::string log;  // version of the log that its task was told by; empty: none
  v1::Reply header;
  Contribution work;
  bool done = false;  // the header is of a reply, whose payload waits on disk
};

class Kept {
 public:
  // With `keep_updates` every reply also stays in <state>/updates, by round.
  Kept(std::filesystem::path state, bool keep_updates);

  std::optional<Begun> begun() const;
  // The payload of a reply that is done; empty if there is none.
  std::string payload() const;

  void begin(const Begun& begun) const;                              // throw DiskError
  void finish(const Begun& begun, const std::string& payload) const;
  void clear() const;

 private:
  std::filesystem::path record_, payload_;
  std::filesystem::path updates_;  // empty: they are not kept
};

}  // namespace corolla
