// Loads and stores in memory that another thread or process may be writing or reading.
//
// A reader of such memory may copy what a writer is overwriting; it finds out afterwards, by a
// generation number (a seqlock), and throws the copy away. For that the accesses themselves must be
// atomic, or the compiler may assume that they do not meet: these are relaxed atomics of at most 8
// bytes, which cost what plain ones cost. The order between them comes from the acquire and release
// operations of the caller.
#ifndef KIMI_BASE_SHARED_H_
#define KIMI_BASE_SHARED_H_

#include <bit>
#include <cstddef>
#include <cstdint>

namespace kimi::shared {

static_assert(std::endian::native == std::endian::little, "files hold little-endian numbers");

template <typename T>
T Load(const T& at) {
  return __atomic_load_n(&at, __ATOMIC_RELAXED);
}

template <typename T>
void Store(T& at, T value) {
  __atomic_store_n(&at, value, __ATOMIC_RELAXED);
}

template <typename T>
T LoadAcquire(const T& at) {
  return __atomic_load_n(&at, __ATOMIC_ACQUIRE);
}

template <typename T>
void StoreRelease(T& at, T value) {
  __atomic_store_n(&at, value, __ATOMIC_RELEASE);
}

// Sequentially consistent, for where two sides each store and then look at what the other stored.
template <typename T>
T LoadOrdered(const T& at) {
  return __atomic_load_n(&at, __ATOMIC_SEQ_CST);
}

template <typename T>
void StoreOrdered(T& at, T value) {
  __atomic_store_n(&at, value, __ATOMIC_SEQ_CST);
}

// Stores `value` if `expected` is there; whether it was.
template <typename T>
bool Replace(T& at, T expected, T value) {
  return __atomic_compare_exchange_n(&at, &expected, value, false, __ATOMIC_SEQ_CST,
                                     __ATOMIC_SEQ_CST);
}

// The same bytes are read as numbers of several sizes: may_alias keeps that legal.
using Word [[gnu::may_alias]] = uint64_t;
using Half [[gnu::may_alias]] = uint32_t;
using Byte [[gnu::may_alias]] = uint8_t;

// Copies private memory into shared memory.
inline void CopyIn(void* to, const void* from, size_t size) {
  auto out = static_cast<Byte*>(to);
  auto in = static_cast<const Byte*>(from);
  for (; size > 0 && reinterpret_cast<uintptr_t>(out) % 8 != 0; --size) {
    __atomic_store_n(out++, *in++, __ATOMIC_RELAXED);
  }
  for (; size >= 8; size -= 8, out += 8, in += 8) {
    uint64_t word;
    __builtin_memcpy(&word, in, 8);
    __atomic_store_n(reinterpret_cast<Word*>(out), word, __ATOMIC_RELAXED);
  }
  for (; size > 0; --size) __atomic_store_n(out++, *in++, __ATOMIC_RELAXED);
}

// Copies shared memory into private memory.
inline void CopyOut(void* to, const void* from, size_t size) {
  auto out = static_cast<Byte*>(to);
  auto in = static_cast<const Byte*>(from);
  for (; size > 0 && reinterpret_cast<uintptr_t>(in) % 8 != 0; --size) {
    *out++ = __atomic_load_n(in++, __ATOMIC_RELAXED);
  }
  for (; size >= 8; size -= 8, out += 8, in += 8) {
    const uint64_t word = __atomic_load_n(reinterpret_cast<const Word*>(in), __ATOMIC_RELAXED);
    __builtin_memcpy(out, &word, 8);
  }
  for (; size > 0; --size) *out++ = __atomic_load_n(in++, __ATOMIC_RELAXED);
}

}  // namespace kimi::shared

#endif  // KIMI_BASE_SHARED_H_
