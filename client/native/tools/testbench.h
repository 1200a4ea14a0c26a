// The commands of corolla-native-check.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

namespace corolla {

using Arguments = std::vector<std::string>;  // the name of the command first

struct Command {
  size_t arguments;  // at least, the name included
  std::function<void(const Arguments&)> run;
};

using Commands = std::map<std::string, Command>;

Commands task_commands();     // what needs an engine
Commands reading_commands();  // what needs messages

// Throws Error naming the first vector of proto/signs-v1.json that differs.
void check_vectors(const std::string& text);

std::string slurp(const std::string& path);
void spill(const std::string& path, const std::string& bytes);

}  // namespace corolla
