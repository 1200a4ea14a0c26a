#include "training/bundle.h"

#include <openssl/evp.h>
#include <openssl/pem.h>

#include <memory>
#include <set>

#include "base/error.h"
#include "base/files.h"
#include "base/hash.h"
#include "base/json.h"

namespace corolla {
namespace {

using nlohmann::json;

constexpr uint64_t kMostManifest = 16 << 20;
constexpr size_t kSignature = 64;  // bytes of an Ed25519 signature
constexpr uint64_t kMostSerial = (uint64_t{1} << 53) - 1;

using Key = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;

Key public_key(const std::filesystem::path& publisher) {
  auto text = read_file(publisher);
  if (!text) throw Error("cannot read the publisher's key " + publisher.string());
  std::unique_ptr<BIO, decltype(&BIO_free)> memory(
      BIO_new_mem_buf(text->data(), static_cast<int>(text->size())), &BIO_free);
  Key key(PEM_read_bio_PUBKEY(memory.get(), nullptr, nullptr, nullptr), &EVP_PKEY_free);
  if (!key || EVP_PKEY_id(key.get()) != EVP_PKEY_ED25519)
    throw Error(publisher.string() + " is no public key of Ed25519 (PEM)");
  return key;
}

bool signed_by(EVP_PKEY* key, const std::string& signature, const std::string& data) {
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(),
                                                                  &EVP_MD_CTX_free);
  auto bytes = [](const std::string& text) {
    return reinterpret_cast<const unsigned char*>(text.data());
  };
  return signature.size() == kSignature && context &&
         EVP_DigestVerifyInit(context.get(), nullptr, nullptr, nullptr, key) == 1 &&
         EVP_DigestVerify(context.get(), bytes(signature), signature.size(), bytes(data),
                          data.size()) == 1;
}

void check_versions(const json& all) {
  int version = all.at("version").get<int>();
  if (version != kBundleVersion)
    throw Error("the bundle is of version " + std::to_string(version) + ", this client reads " +
                std::to_string(kBundleVersion));
  int signs = all.at("signs").get<int>();
  if (signs != kSignsVersion)
    throw Error("the bundle asks for version " + std::to_string(signs) +
                " of the sign stream, this client has " + std::to_string(kSignsVersion));
}

// A manifest without one is of before there were any.
uint64_t read_serial(const json& all) {
  const auto found = all.find("serial");
  if (found == all.end()) return 0;
  if (!found->is_number_unsigned() || found->get<uint64_t>() > kMostSerial)
    throw Error("manifest.json has no usable serial: expected a whole number from 0 to 2^53-1");
  return found->get<uint64_t>();
}

Program read_program(const json& one) {
  Program program;
  program.name = one.at("name").get<std::string>();
  program.base = one.at("base").get<std::string>();
  program.files = one.at("files").get<std::vector<std::string>>();
  program.eps_low = one.at("eps").at(0).get<double>();
  program.eps_high = one.at("eps").at(1).get<double>();
  for (const auto& [name, facts] : one.at("methods").items()) {
    Method method{facts.at("file").get<std::string>(), {}};
    for (const auto& [tokens, bytes] : facts.at("planned").items())
      method.planned[std::stoi(tokens)] = bytes.get<uint64_t>();
    program.methods[name] = method;
  }
  return program;
}

Tokenizer read_tokenizer(const json& one) {
  auto token = [&](const char* name) {
    auto found = one.find(name);
    return found == one.end() || found->is_null() ? int64_t{-1} : found->get<int64_t>();
  };
  return {one.at("files").get<std::vector<std::string>>(), token("eos"), token("pad"),
          token("bos")};
}

// A name of the manifest becomes one of a file in the bundle's folder.
void check_file(const std::string& name) {
  bool plain = !name.empty() && name.size() <= 200 && name[0] != '.' &&
               name.find_first_of("/\\") == std::string::npos &&
               name.find('\0') == std::string::npos;
  if (!plain) throw Error("manifest.json names " + one_line(name) + ", which is no file's name");
}

void check(const Manifest& manifest) {
  for (const auto& [name, facts] : manifest.files) {
    check_file(name);
    if (!is_hex(facts.sha256, 64)) throw Error("manifest.json has no sha256 of " + name);
  }
  if (manifest.rank < 1 || manifest.length < 2 || manifest.adapter.empty())
    throw Error("manifest.json describes no adapter");
  for (const auto& tensor : manifest.adapter)
    for (int64_t side : tensor.shape)
      if (side < 1 || side > INT32_MAX)
        throw Error("manifest.json: shape of " + one_line(tensor.name));
  for (const auto& program : manifest.programs) {
    std::set<std::string> own(program.files.begin(), program.files.end());
    for (const auto& name : program.files)
      if (!manifest.files.count(name)) throw Error("manifest.json lacks " + one_line(name));
    for (const auto& [method, facts] : program.methods)
      if (!own.count(facts.file))
        throw Error("manifest.json: no file has the method " + one_line(method));
  }
}

}  // namespace

int64_t AdapterTensor::size() const {
  int64_t product = 1;
  for (int64_t side : shape) product *= side;
  return product;
}

int64_t Manifest::parameters() const {
  int64_t sum = 0;
  for (const auto& tensor : adapter) sum += tensor.size();
  return sum;
}

const Program& Manifest::program(const std::string& name) const {
  for (const auto& program : programs)
    if (program.name == name) return program;
  throw Error("the bundle has no program " + one_line(name));
}

const Method& Program::method(const std::string& wanted) const {
  auto found = methods.find(wanted);
  if (found == methods.end())
    throw Error("the program " + name + " has no method " + one_line(wanted));
  return found->second;
}

std::string Program::data() const {
  for (const auto& file : files)
    if (std::filesystem::path(file).extension() == ".ptd") return file;
  return "";
}

Manifest parse_manifest(const std::string& text) {
  Manifest found;
  try {
    json all = parse_json(text, "manifest.json");
    check_versions(all);
    found.serial = read_serial(all);
    found.model = all.at("model").get<std::string>();
    found.model_sha256 = all.at("model_sha256").get<std::string>();
    found.executorch = all.at("executorch").get<std::string>();
    found.executorch_min = all.at("executorch_min").get<std::string>();
    found.rank = all.at("rank").get<int>();
    found.targets = all.at("targets").get<std::vector<std::string>>();
    found.vocab = all.at("vocab").get<int64_t>();
    found.length = all.at("length").get<int>();
    found.tokenizer = read_tokenizer(all.at("tokenizer"));
    for (const auto& one : all.at("adapter"))
      found.adapter.push_back({one.at("name").get<std::string>(),
                               one.at("shape").get<std::vector<int64_t>>()});
    for (const auto& one : all.at("programs")) found.programs.push_back(read_program(one));
    for (const auto& [name, facts] : all.at("files").items())
      found.files[name] = {facts.at("sha256").get<std::string>(),
                           facts.at("bytes").get<uint64_t>()};
  } catch (const json::exception& error) {
    throw Error("manifest.json cannot be read: " + one_line(error.what()));
  } catch (const std::logic_error& error) {  // of stoi
    throw Error("manifest.json cannot be read: a length in tokens is no number");
  }
  check(found);
  return found;
}

Manifest read_bundle(const std::filesystem::path& folder, const std::filesystem::path& publisher) {
  auto text = read_file(folder / "manifest.json", kMostManifest);
  if (!text) throw Error(folder.string() + " is no bundle: it has no manifest.json");
  auto signature = read_file(folder / "manifest.sig");
  if (!signature) throw Error(folder.string() + " is not signed: it has no manifest.sig");
  if (!signed_by(public_key(publisher).get(), *signature, *text))
    throw Error("manifest.json is not signed by the key in " + publisher.string());
  return parse_manifest(*text);
}

std::string publisher_id(const std::filesystem::path& publisher) {
  unsigned char raw[32];
  size_t size = sizeof raw;
  if (EVP_PKEY_get_raw_public_key(public_key(publisher).get(), raw, &size) != 1 ||
      size != sizeof raw)
    throw Error(publisher.string() + " is no public key of Ed25519 (PEM)");
  return sha256({reinterpret_cast<const char*>(raw), size});
}

void verify_files(const Manifest& manifest, const std::filesystem::path& folder,
                  const std::vector<std::string>& names) {
  for (const auto& name : names) {
    auto facts = manifest.files.find(name);
    if (facts == manifest.files.end()) throw Error("manifest.json lacks " + one_line(name));
    std::error_code error;
    uint64_t size = std::filesystem::file_size(folder / name, error);
    if (error) throw Error("the bundle lacks " + name);
    if (size != facts->second.bytes)
      throw Error(name + " has " + std::to_string(size) + " bytes, " +
                  std::to_string(facts->second.bytes) + " in manifest.json");
    if (file_sha256(folder / name) != facts->second.sha256)
      throw Error(name + " does not match its sha256 in manifest.json");
  }
}

}  // namespace corolla
