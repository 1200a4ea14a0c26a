// A bundle: programs that an exporter made of a model, and the signed manifest that describes them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace corolla {

constexpr int kBundleVersion = 1;
constexpr int kSignsVersion = 1;  // of proto/signs-v1.md

struct AdapterTensor {
  std::string name;  // "<module>.lora_A" or "<module>.lora_B"
  std::vector<int64_t> shape;

  int64_t size() const;  // numbers in it
};

struct Method {
  std::string file;                 // the program that has it
  std::map<int, uint64_t> planned;  // tokens -> bytes of memory of the whole process
};

struct Program {
  std::string name, base;  // base: "fp32", "8da4w"
  std::vector<std::string> files;
  double eps_low = 0, eps_high = 0;  // where projected gradients are sound
  std::map<std::string, Method> methods;

  // Throws Error for a method that the program does not have.
  const Method& method(const std::string& name) const;
  // The file with its weights (*.ptd), empty where they are in the program.
  std::string data() const;
};

struct Tokenizer {
  std::vector<std::string> files;
  int64_t eos = -1, pad = -1, bos = -1;  // -1: none
};

struct BundleFile {
  std::string sha256;  // 64 hexadecimal characters
  uint64_t bytes = 0;
};

struct Manifest {
  uint64_t serial = 0;  // a publisher's newer bundle has a higher one
  std::string model, model_sha256;
  std::string executorch, executorch_min;  // versions: made with, runs from
  int rank = 0;
  std::vector<std::string> targets;
  int64_t vocab = 0;
  int length = 0;  // tokens of a sequence, at most
  Tokenizer tokenizer;
  std::vector<AdapterTensor> adapter;  // in the order of the flat vector
  std::vector<Program> programs;
  std::map<std::string, BundleFile> files;

  int64_t parameters() const;  // of the adapter
  // Throws Error for one that is not there.
  const Program& program(const std::string& name) const;
};

// Throws Error for what cannot be read, another version of it, another sign stream.
Manifest parse_manifest(const std::string& text);

// The manifest of a folder, whose signature is that of the public key (PEM) in `publisher`. The
// files that it names are not looked at. Throws Error.
Manifest read_bundle(const std::filesystem::path& folder, const std::filesystem::path& publisher);

// The sha256 of the 32 bytes of a public key (PEM), as 64 hexadecimal characters. Throws Error.
std::string publisher_id(const std::filesystem::path& publisher);

// Throws Error naming the first of `names` that is missing, of another size or of another content.
void verify_files(const Manifest& manifest, const std::filesystem::path& folder,
                  const std::vector<std::string>& names);

}  // namespace corolla
