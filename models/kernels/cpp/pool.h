// Memory that runs work in, kept from one to the next.
#pragma once
#include <cstdlib>
#include <mutex>
#include <vector>

namespace far_engine {

// Blocks, as many as callers were ever busy at once, so nothing is allocated twice.
class Pool {
 public:
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };
  Pool() = default;
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() {
    for (const Block& block : free) std::free(block.data);
  }
  // A block of any size, or an empty one.
  Block take() {
    const std::lock_guard<std::mutex> hold(lock);
    free.reserve(++lent);  // so that nothing is allocated when blocks come back
    if (free.empty()) return {};
    const Block block = free.back();
    free.pop_back();
    return block;
  }
  void give(Block block) {
    const std::lock_guard<std::mutex> hold(lock);
    --lent;
    free.push_back(block);
  }

 private:
  std::mutex lock;
  std::vector<Block> free;
  size_t lent = 0;
};

}  // namespace far_engine
