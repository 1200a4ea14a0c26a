// What goes wrong and can be told in one line.
#pragma once

#include <stdexcept>
#include <string>

namespace corolla {

// The same text with spaces in the place of line ends and other control characters: it may quote
// what a peer has sent.
inline std::string flat(std::string text) {
  for (char& c : text)
    if (static_cast<unsigned char>(c) < ' ' || c == 0x7f) c = ' ';
  return text;
}

// A task that cannot be done, an input that is not what it should be: the text is for its owner.
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& text) : std::runtime_error(flat(text)) {}
};

// The conditions of work do not hold any more: what was done so far is in a checkpoint.
class Lapsed : public Error {
 public:
  using Error::Error;
};

}  // namespace corolla
