// How does a weight meet a hundred tokens?
// Generated from book/kernels/panels.py; edit the chapter, not this file.

namespace {

// blocks of memory that were given back, by their bytes
class Pool {
  static constexpr std::align_val_t LINE{64};
  static constexpr size_t MOST = 1 << 30;
  std::mutex lock;
  std::multimap<size_t, void*> blocks;
  size_t held = 0;

  void drop() {
    for (const auto& [bytes, at] : blocks) ::operator delete(at, LINE);
    blocks.clear(), held = 0;
  }

 public:
  std::pair<size_t, void*> take(size_t bytes) {  // at least so many
    const std::lock_guard<std::mutex> guard(lock);
    const auto found = blocks.lower_bound(bytes);
    if (found == blocks.end() || found->first > 2 * bytes)
      return {bytes, ::operator new(bytes, LINE)};
    const auto block = *found;
    blocks.erase(found), held -= block.first;
    return block;
  }

  void give(size_t bytes, void* at) {
    const std::lock_guard<std::mutex> guard(lock);
    blocks.emplace(bytes, at), held += bytes;
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

// an empty tensor for this call alone, whose memory the next one takes again
Tensor scratch(at::IntArrayRef sizes, at::ScalarType type) {
  constexpr size_t LARGE = 1 << 20;  // smaller: whatever malloc has
  const size_t bytes = c10::multiply_integers(sizes)
                       * c10::elementSize(type);
  if (bytes < LARGE) return at::empty(sizes, type);
  const auto [all, at] = pool().take(bytes);
  const size_t whole = all;  // some compilers do not capture `all`
  return at::from_blob(at, sizes, [whole](void* block) {
    pool().give(whole, block);
  }, type);
}

}  // namespace
