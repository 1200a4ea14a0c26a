// What goes wrong and can be told in one line.
#pragma once

#include <stdexcept>
#include <string>

namespace corolla {

// A task that cannot be done, an input that is not what it should be: the text is for its owner.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The conditions of work do not hold any more: what was done so far is in a checkpoint.
class Lapsed : public Error {
 public:
  using Error::Error;
};

}  // namespace corolla
