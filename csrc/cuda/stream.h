// CUDA's name for a stream, as its headers have it, so that a launcher's door needs none of them.
#pragma once

using cudaStream_t = struct CUstream_st*;
