// far-run: names what is in pictures, by a file that `export.py --to engine` wrote.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <optional>
#include <random>
#include <thread>

#include "far.h"
#include "picture.h"

#if defined(__unix__)
#include <sys/resource.h>
#endif

namespace {

constexpr char USAGE[] =
    "usage: far-run MODEL.far [options] PICTURE ...\n"
    "  PICTURE       png, jpeg, bmp; or NAME.f32: images as the model reads them, float32\n"
    "  --top N       so many of the likeliest classes (5)\n"
    "  --raw         logits as float32 bytes, and nothing else\n"
    "  --threads N   at most (as many as this machine runs)\n"
    "  --bench       no pictures: the time until the first answer and after\n"
    "  --batch N     so many images at once in --bench (1)\n";

using Clock = std::chrono::steady_clock;
double since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

struct Options {
  const char* model = nullptr;
  std::vector<const char*> pictures;
  int top = 5, threads = int(std::max(1u, std::thread::hardware_concurrency())), batch = 1;
  bool raw = false, bench = false, help = false;

  // Throws std::runtime_error on what it does not know.
  Options(int count, char** words) {
    for (int i = 1; i < count; ++i) {
      const std::string word = words[i];
      const auto number = [&] {
        char* end = nullptr;
        const long value = i + 1 < count ? std::strtol(words[++i], &end, 10) : 0;
        if (!end || *end || value < 1 || value > 4096)
          throw std::runtime_error(word + ": needs a number from 1 to 4096");
        return int(value);
      };
      if (word == "--top")
        top = number();
      else if (word == "--threads")
        threads = number();
      else if (word == "--batch")
        batch = number();
      else if (word == "--raw")
        raw = true;
      else if (word == "--bench")
        bench = true;
      else if (word == "--help" || word == "-h")
        help = true;
      else if (word.rfind("--", 0) == 0)
        throw std::runtime_error(word + ": no option of far-run; see far-run --help");
      else if (!model)
        model = words[i];
      else
        pictures.push_back(words[i]);
    }
    if (help) return;
    if (!model) throw std::runtime_error("no model named; see far-run --help");
    if (pictures.empty() && !bench) throw std::runtime_error("no picture named; see far-run --help");
    if (bench && (!pictures.empty() || raw))
      throw std::runtime_error("--bench: reads no pictures and prints times alone");
    if (batch > 1 && !bench) throw std::runtime_error("--batch: belongs to --bench");
  }
};

// Control characters, which a terminal would obey, as question marks.
std::string printable(const std::string& text) {
  std::string out = text;
  for (char& c : out) c = (unsigned char)c < 0x20 || c == 0x7f ? '?' : c;
  return out;
}

// Image after image of a .f32 file.
std::vector<float> read_floats(const char* path, size_t each) {
  const std::vector<unsigned char> bytes = far_picture::read_file(path);
  if (bytes.empty() || bytes.size() % (4 * each))
    throw std::runtime_error("not a file of images of " + std::to_string(each) + " floats each");
  std::vector<float> images(bytes.size() / 4);
  std::memcpy(images.data(), bytes.data(), bytes.size());
  return images;
}

void check(const char* fault) {
  if (fault) throw std::runtime_error(fault);
}

void name(const far_shape& shape, const float* logits, int top) {
  std::vector<int64_t> order(shape.classes);
  std::iota(order.begin(), order.end(), 0);
  top = int(std::min<int64_t>(top, shape.classes));
  std::partial_sort(order.begin(), order.begin() + top, order.end(),
                    [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
  double sum = 0;
  for (int64_t i = 0; i < shape.classes; ++i) sum += std::exp(double(logits[i]) - logits[order[0]]);
  for (int i = 0; i < top; ++i) {
    const double share = 100 * std::exp(double(logits[order[i]]) - logits[order[0]]) / sum;
    if (shape.names)
      std::printf("  %6.2f %%  %s\n", share, printable(shape.names[order[i]]).c_str());
    else
      std::printf("  %6.2f %%  class %lld\n", share, (long long)order[i]);
  }
}

void bench(const far_model* model, const far_shape& shape, const Options& options, double opened) {
  std::vector<float> images(size_t(options.batch) * shape.channels * shape.height * shape.width);
  std::mt19937 numbers(0);
  std::normal_distribution<float> noise;
  for (float& x : images) x = noise(numbers);
  std::vector<float> logits(size_t(options.batch) * shape.classes);
  std::vector<double> times;
  for (const auto start = Clock::now(); times.size() < 8 || since(start) < 3000;) {
    const auto begin = Clock::now();
    check(far_run(model, images.data(), options.batch, logits.data(), options.threads));
    times.push_back(since(begin));
  }
  const double first = times.front();
  std::sort(times.begin(), times.end());
  std::printf("opened in %.2f ms, first answer in %.2f ms, then %.3f ms (median of %zu; quartiles %.3f to %.3f)",
              opened, first, times[times.size() / 2], times.size(), times[times.size() / 4],
              times[times.size() * 3 / 4]);
  std::printf(", batch %d, %d threads", options.batch, options.threads);
#if defined(__unix__)
  rusage used;
  if (!getrusage(RUSAGE_SELF, &used)) std::printf(", peak memory %.1f MB", used.ru_maxrss / 1024.0);
#endif
  std::printf("\n");
}

int run(const Options& options) {
  if (options.help) return std::fputs(USAGE, stdout), 0;
  const auto start = Clock::now();
  const std::unique_ptr<far_model, void (*)(far_model*)> model(far_open(options.model), far_close);
  if (const char* error = far_error(model.get())) throw std::runtime_error(std::string(options.model) + " " + error);
  const double opened = since(start);
  const far_shape shape = far_describe(model.get());
  if (options.bench) return bench(model.get(), shape, options, opened), 0;
  const size_t each = size_t(shape.channels) * shape.height * shape.width;
  std::optional<far_picture::Preparation> how;  // .f32 files need none
  int code = 0;
  for (const char* path : options.pictures) try {
      const std::string name_of = path;
      const bool floats = name_of.size() > 4 && name_of.compare(name_of.size() - 4, 4, ".f32") == 0;
      if (!floats && (shape.channels != 3 || shape.height != shape.width))
        throw std::runtime_error("this model reads no square pictures of three channels; give it .f32 files");
      if (!floats && !how) how.emplace(shape.config, shape.height);
      const std::vector<float> images =
          floats ? read_floats(path, each) : far_picture::prepare(far_picture::read(path), *how);
      const int64_t batch = images.size() / each;
      std::vector<float> logits(batch * shape.classes);
      const auto begin = Clock::now();
      check(far_run(model.get(), images.data(), batch, logits.data(), options.threads));
      const double ms = since(begin);
      if (options.raw) {
        std::fwrite(logits.data(), sizeof(float), logits.size(), stdout);
        continue;
      }
      std::printf("%s  (%.2f ms)\n", printable(path).c_str(), ms);
      for (int64_t i = 0; i < batch; ++i) name(shape, &logits[i * shape.classes], options.top);
    } catch (const std::exception& reason) {
      std::fflush(stdout);
      const bool memory = dynamic_cast<const std::bad_alloc*>(&reason);
      std::fprintf(stderr, "error: %s: %s\n", printable(path).c_str(), memory ? "out of memory" : reason.what());
      code = 2;
      if (options.raw) break;  // whoever reads bytes could not tell whose are missing
    }
  return code;
}

}  // namespace

int main(int count, char** words) try { return run(Options(count, words)); } catch (const std::exception& reason) {
  const bool memory = dynamic_cast<const std::bad_alloc*>(&reason);
  std::fprintf(stderr, "error: %s\n", memory ? "out of memory" : reason.what());
  return 2;
}
