// Damaged files: each must be refused in words or answer, never crash or read outside. Built by tests/test_runtime.py
// with the sanitizers; as a target of libFuzzer by clang++ -fsanitize=fuzzer,address,undefined -DFAR_LIBFUZZER.
//
//   fuzz MODEL.far COUNT SEED     so many files, one to four bits flipped, in every second the checksum made right
#include <random>

#include "far.cpp"

namespace {

// Opens the bytes as a file, and runs one image of zeros. Returns whether there was an answer.
bool try_bytes(std::string& bytes) {
  std::FILE* file = fmemopen(bytes.data(), bytes.size(), "rb");
  far_model model;
  try {
    model.open(file);
  } catch (const std::exception& reason) { model.error = reason.what(); }
  if (file) std::fclose(file);
  if (far_error(&model)) return false;
  const far_shape shape = far_describe(&model);
  const std::vector<float> image(shape.channels * shape.height * shape.width);
  std::vector<float> logits(shape.classes);
  return !far_run(&model, image.data(), 1, logits.data(), 1);
}

[[maybe_unused]] void correct_checksum(std::string& bytes) {
  uint64_t sums[2];
  check_sums(&bytes[sizeof(Header)], (bytes.size() - sizeof(Header)) / 8 * 8, sums);
  std::memcpy(&bytes[sizeof(Header) - sizeof sums], sums, sizeof sums);
}

}  // namespace

#ifdef FAR_LIBFUZZER
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string bytes(reinterpret_cast<const char*>(data), size);
  if (size >= sizeof(Header)) correct_checksum(bytes);
  if (size) try_bytes(bytes);
  return 0;
}
#else
int main(int count, char** words) {
  if (count != 4) return 2;
  std::FILE* file = std::fopen(words[1], "rb");
  if (!file) return 2;
  std::string whole;
  for (int c; (c = std::fgetc(file)) != EOF;) whole += char(c);
  std::fclose(file);
  std::mt19937 numbers(std::atoi(words[3]));
  const auto below = [&](size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(numbers); };
  // Half of the flips fall on what is not weights: the header, the configuration and the plan.
  Header header;
  std::memcpy(&header, whole.data(), sizeof header);
  const size_t front = sizeof header + padded(header.config) + padded(header.plan);
  int answers = 0;
  const int tries = std::atoi(words[2]);
  for (int i = 0; i < tries; ++i) {
    std::string bytes = whole;
    for (size_t flips = 1 + below(4); flips--;) bytes[below(below(2) ? front : whole.size())] ^= char(1 << below(8));
    if (i % 2) correct_checksum(bytes);
    answers += try_bytes(bytes);
  }
  std::printf("%d files, %d answered\n", tries, answers);
  return 0;
}
#endif
