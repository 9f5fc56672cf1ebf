// What every kernel of this folder agrees on.
#pragma once

namespace zinit::cuda {

constexpr int kThreads = 128;  // of a block
constexpr int kWarps = kThreads / 32;
constexpr int kMaxSharedBytes = 99 << 10;  // of a block on sm_86, 89 and 120, which have the least
constexpr int kMaxRows = (1 << 30) - 256;  // a sequence has fewer: a position plus a window stays an int
constexpr unsigned kAllLanes = ~0u;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

}  // namespace zinit::cuda
