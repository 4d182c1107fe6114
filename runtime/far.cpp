// The library: a file to a packed model. All integers are of 64 bits, little-endian:
//
//   magic      "\x89" "FAR\r\n\x1a\n"
//   version    LAYOUT of model.h
//   bytes      of config, plan, vectors and products
//   checksum   Fletcher's, of all that follows as 64-bit words: their sum, and the sum of the sums after each
//   config     JSON                                     each part padded with zeros to 64 bytes
//   plan, vectors, products                             model.h's natural form
#include "far.h"

#include <sys/stat.h>

#include <bit>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>

#include "../models/kernels/cpp/model.h"
#include "json.h"

namespace {

struct Header {
  char magic[8];
  int64_t version, config, plan, vectors, products;
  uint64_t checksum[2];
};
static_assert(sizeof(Header) == 64);

constexpr char MAGIC[9] =
    "\x89"
    "FAR\r\n\x1a\n";

int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

[[noreturn]] void refuse(const std::string& why) { throw std::runtime_error(why); }

// Fletcher's checksum of so many bytes, whole words.
void check_sums(const char* from, int64_t bytes, uint64_t (&sums)[2]) {
  sums[0] = sums[1] = 0;
  for (int64_t i = 0; i < bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, from + i, 8);
    sums[0] += word;
    sums[1] += sums[0];
  }
}

// The parts of a file, as they stand in it.
struct File {
  Header header;
  std::unique_ptr<char[]> content;

  explicit File(std::FILE* file) {
    if (!file) refuse("is no file that can be opened");
    if (std::fread(&header, 1, sizeof header, file) != sizeof header || std::memcmp(header.magic, MAGIC, 8))
      refuse("is no file of `export.py --to engine`");
    if (std::endian::native != std::endian::little || header.version >> 32) refuse("has the other order of bytes");
    if (header.version != far_engine::LAYOUT)
      refuse("is of version " + std::to_string(header.version) + ", and this program reads version " +
             std::to_string(far_engine::LAYOUT) + ": export the model again");
    int64_t length = 0;
    for (const int64_t bytes : {header.config, header.plan, header.vectors, header.products}) {
      if (bytes < 0 || bytes > int64_t{1} << 40) refuse("is damaged: its parts have no sizes");
      length += padded(bytes);
    }
    if (header.config > int64_t{1} << 24) refuse("is damaged: its configuration is too long");
    // No memory is taken before the file is known to be as long as it says.
    std::fseek(file, 0, SEEK_END);
    const int64_t rest = int64_t(std::ftell(file)) - int64_t(sizeof header);
    if (rest > length) refuse("is damaged: it is longer than its parts");
    content.reset(rest < length ? nullptr : new char[length]);
    std::fseek(file, sizeof header, SEEK_SET);
    if (!content || int64_t(std::fread(content.get(), 1, length, file)) != length) refuse("is cut short");
    uint64_t sums[2];
    check_sums(content.get(), length, sums);
    if (std::memcmp(sums, header.checksum, sizeof sums)) refuse("is damaged: its checksum is another");
  }

  const char* config() const { return content.get(); }
  const char* plan() const { return config() + padded(header.config); }
  const char* vectors() const { return plan() + padded(header.plan); }
  const char* products() const { return vectors() + padded(header.vectors); }
};

}  // namespace

struct far_model {
  std::string error, config;
  far_engine::Packed packed;
  std::vector<std::string> texts;
  std::vector<const char*> names;
  mutable far_engine::Pool pool;

  // Throws std::exception with why it cannot be used.
  void open(std::FILE* stream) {
    const File file(stream);
    config.assign(file.config(), file.header.config);
    const auto* plan = reinterpret_cast<const int64_t*>(file.plan());
    const auto* vectors = reinterpret_cast<const float*>(file.vectors());
    const int64_t length = file.header.plan / 8;
    const int64_t precision = length > 2 ? plan[2] : 0;
    if (precision < 0 || precision >= far_engine::PRECISIONS) refuse("is damaged: its numbers have no precision");
    const int64_t numbers = file.header.vectors / 4, weights = file.header.products / far_engine::BYTES[precision];
    if (const char* fault = far_engine::find_fault(plan, length, numbers, weights, precision, true))
      refuse("is damaged: its plan does not fit (" + std::string(fault) + ")");
    packed =
        far_engine::pack(*reinterpret_cast<const far_engine::Plan*>(plan), vectors, numbers, file.products(), weights);
    const far_json::Value facts = far_json::Reader(config).read();
    for (const far_json::Value& name : facts["classes"].list) texts.push_back(name.text);
    if (!texts.empty() && int64_t(texts.size()) != packed.head().classes)
      refuse("is damaged: it names " + std::to_string(texts.size()) + " classes of " +
             std::to_string(packed.head().classes));
    for (const std::string& text : texts) names.push_back(text.c_str());
  }
};

extern "C" {

far_model* far_open(const char* path) {
  far_model* model = new (std::nothrow) far_model;
  if (!model) return nullptr;
  struct stat status;  // a pipe would be waited for
  const bool regular = path && !stat(path, &status) && S_ISREG(status.st_mode);
  std::FILE* file = regular ? std::fopen(path, "rb") : nullptr;
  try {
    model->open(file);
  } catch (const std::bad_alloc&) {
    model->error = "out of memory";  // short enough for a string to hold without any
  } catch (const std::exception& reason) {
    try {
      model->error = reason.what();
    } catch (const std::bad_alloc&) { model->error = "out of memory"; }
  }
  if (file) std::fclose(file);
  return model;
}

const char* far_error(const far_model* model) {
  if (!model) return "out of memory";
  return model->error.empty() ? nullptr : model->error.c_str();
}

far_shape far_describe(const far_model* model) {
  if (far_error(model)) return {};
  const far_engine::Plan& plan = model->packed.head();
  const char* const* names = model->names.empty() ? nullptr : model->names.data();
  return {plan.channels, plan.height, plan.width, plan.classes, names, model->config.c_str()};
}

const char* far_run(const far_model* model, const float* images, int64_t batch, float* logits, int threads) {
  if (const char* error = far_error(model)) return error;
  if (!images || !logits || batch < 0 || threads < 1) return "no images, no place for logits, or no threads";
  if (!batch) return nullptr;
  const far_engine::Plan& plan = model->packed.head();
  // More than there are cores would only take memory.
  if (const int cores = int(std::thread::hardware_concurrency())) threads = std::min(threads, cores);
  const int64_t strides[] = {plan.channels * plan.height * plan.width, plan.height * plan.width, plan.width, 1};
  try {
    far_engine::run(plan, model->packed.vectors.data(), model->packed.products.data(), images, batch, strides, logits,
                    threads, model->pool);
  } catch (const std::bad_alloc&) {
    return "out of memory";
  } catch (const std::exception&) {  // what a lock of the system's may throw
    return "the system refuses a lock";
  }
  return nullptr;
}

void far_close(far_model* model) { delete model; }
}
