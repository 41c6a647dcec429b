// Loads and stores in memory that another thread or process may access at the same time.
//
// A reader may copy bytes that a writer is overwriting. A generation number tells it afterwards (a
// seqlock), and it drops the copy. The accesses must therefore be atomic. These are relaxed atomics
// of at most 8 bytes, as fast as plain accesses; the caller's acquire and release operations order
// them.
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

// Sequentially consistent: for two sides that each store and then load what the other side stores.
template <typename T>
T LoadOrdered(const T& at) {
  return __atomic_load_n(&at, __ATOMIC_SEQ_CST);
}

template <typename T>
void StoreOrdered(T& at, T value) {
  __atomic_store_n(&at, value, __ATOMIC_SEQ_CST);
}

// Stores `value` if `at` holds `expected`. Returns whether it did.
template <typename T>
bool Replace(T& at, T expected, T value) {
  return __atomic_compare_exchange_n(&at, &expected, value, false, __ATOMIC_SEQ_CST,
                                     __ATOMIC_SEQ_CST);
}

// The same bytes are accessed as numbers of several sizes, which may_alias makes legal.
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
