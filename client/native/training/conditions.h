// Whether a device may go on working: asked by training, answered by whoever watches the device.
#pragma once

#include <string>

namespace corolla {

// Asked between two passes of one sequence each.
class Conditions {
 public:
  virtual ~Conditions() = default;
  // "" while the work is wanted; else why not, in one line.
  virtual std::string lapsed() = 0;
};

}  // namespace corolla
