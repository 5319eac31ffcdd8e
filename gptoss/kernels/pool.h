// How does a weight meet a hundred tokens?
// Generated from book/kernels/panels.py; edit the chapter, not this file.

#include <map>
#include <mutex>
#include <new>

namespace {

// large pieces of memory that were given back, by their size in MiB
class Pool {
  static constexpr std::align_val_t LINE{64};
  static constexpr size_t MOST = 1024;
  std::mutex lock;
  std::multimap<size_t, void*> pieces;
  size_t held = 0;

  void drop() {
    for (const auto& [size, at] : pieces) ::operator delete(at, LINE);
    pieces.clear(), held = 0;
  }

 public:
  void* take(size_t bytes) {  // at a multiple of 64
    const size_t size = bytes >> 20;
    if (!size) return ::operator new(bytes, LINE);
    const std::lock_guard<std::mutex> guard(lock);
    const auto found = pieces.find(size);
    if (found == pieces.end()) return ::operator new((size + 1) << 20, LINE);
    void* at = found->second;
    pieces.erase(found), held -= size;
    return at;
  }

  void give(size_t bytes, void* at) {
    const size_t size = bytes >> 20;
    if (!size) return ::operator delete(at, LINE);
    const std::lock_guard<std::mutex> guard(lock);
    pieces.emplace(size, at), held += size;
    if (held > MOST) drop();
  }

  void clear() {
    const std::lock_guard<std::mutex> guard(lock);
    drop();
  }
};

Pool& pool() {  // never destroyed: tensors may outlive everything else
  static Pool& one = *new Pool;
  return one;
}

}  // namespace
