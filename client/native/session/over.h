// Ends a session: nothing can come of it any more.
#pragma once

#include "base/error.h"

namespace corolla {

class Over : public Error {
 public:
  using Error::Error;
};

// As far as the gateway was waited for.
class NoAnswer : public Over {
 public:
  using Over::Over;
};

}  // namespace corolla
