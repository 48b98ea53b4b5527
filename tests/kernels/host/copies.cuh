// In place of zq/kernels/src/copies.cuh. A copy is not there before its thread has waited for all.
#pragma once
#include "common.cuh"

static u32 dynamic_shared() { return 2048; }
static u32 shared_word(u32 from) { return *word_of(from); }
static void set_shared_half(u32 to, u16 value) { std::memcpy((u8 *)word_of(0) + to, &value, 2); }
static void copy16(u32 to, const void *from, bool inside) {
  if (to % 16 || (inside && (uintptr_t)from % 16)) abort();
  void *place = word_of(to);
  fiber().asked.push_back([=] { inside ? std::memcpy(place, from, 16) : std::memset(place, 0, 16); });
}
static void copies_commit() { fiber().asked.push_back({}); }  // the end of a group
template <int PENDING> void copies_wait() {
  auto &asked = fiber().asked;
  int groups = 0;
  for (auto &each : asked) groups += !each;
  size_t done = 0;
  for (; groups > PENDING; ++done) asked[done] ? asked[done]() : void(--groups);
  asked.erase(asked.begin(), asked.begin() + done);
}
static void load_matrices(u32 (&b)[4], u32 address) {
  const Exchange *all = exchange(address);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 * 32;
  for (int i = 0; i < 4; ++i) b[i] = *word_of(taken<u32>(all, warp + 8 * i + lane / 4) + lane % 4 * 4);
  __syncwarp();
}
static void load_transposed(u32 (&b)[4], u32 address) {
  const Exchange *all = exchange(address);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 * 32;
  for (int i = 0; i < 4; ++i) {
    u32 both = 0;
    for (int e = 0; e < 2; ++e) {
      u16 value;
      std::memcpy(&value, (u8 *)word_of(taken<u32>(all, warp + 8 * i + lane % 4 * 2 + e)) + lane / 4 * 2, 2);
      both |= (u32)value << 16 * e;
    }
    b[i] = both;
  }
  __syncwarp();
}
