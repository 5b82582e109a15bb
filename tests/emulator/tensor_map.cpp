// Tensor maps: what the driver says to their parameters, and which bytes a box of one has. The rules are those of
// cuda.h's cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col, and of the PTX ISA's section on tensors.
#include <algorithm>
#include <array>
#include <cstring>

#include "cuda.h"
#include "multiprocessor.h"

namespace emulated {
namespace {

constexpr unsigned kMostRank = 5;
constexpr uint32_t kMagic = 0x7e4507a9;

struct TensorMap {  // as it lies in a CUtensorMap
  uint32_t magic;
  uint8_t type, rank, swizzle;
  bool im2col;
  unsigned char* data;
  std::array<uint64_t, kMostRank - 1> strides;  // in bytes, from the second dimension on
  std::array<uint32_t, kMostRank> last;         // index of each dimension
  std::array<uint16_t, kMostRank> box;          // im2col: channels and pixels
  std::array<uint8_t, kMostRank> steps;
  std::array<int16_t, kMostRank - 2> lower, upper;

  uint32_t element_bytes() const;
  uint32_t row_bytes() const { return box[0] * element_bytes(); }
  // Of a swizzled row; 0 without swizzling.
  uint32_t span() const { return swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : 16u << swizzle; }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap) && sizeof(CUtensorMap) == 128 && alignof(CUtensorMap) == 64);

uint32_t bytes_of(int type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
    default:
      return 4;
  }
}

uint32_t TensorMap::element_bytes() const { return bytes_of(type); }

// ---- the driver's ----

// Both kinds have these rules; nullptr if they are kept.
const char* find_fault(const CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, const void* data,
                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* steps,
                       CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapFloatOOBfill fill) {
  if (number(map) % 64 != 0) {
    return "the map's address is no multiple of 64";
  }
  if (type < 0 || type > CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ || swizzle < 0 || swizzle > CU_TENSOR_MAP_SWIZZLE_128B) {
    return "its type or its swizzle is unknown";
  }
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
    return "interleaved tensors and those that NaN surrounds are not emulated";
  }
  if (rank == 0 || rank > kMostRank) {
    return "the rank is not from 1 to 5";
  }
  if (data == nullptr || number(data) % 16 != 0) {
    return "the data's address is no multiple of 16";
  }
  for (unsigned i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || sizes[i] > uint64_t{1} << 32) {
      return "a size is not from 1 to 2^32";
    }
    if (i > 0 && (strides[i - 1] % 16 != 0 || strides[i - 1] >= uint64_t{1} << 40)) {
      return "a stride is no multiple of 16, or not less than 2^40";
    }
    if (i > 0 && strides[i - 1] < (i == 1 ? sizes[0] * bytes_of(type) : 1)) {
      return "a stride is less than a row";
    }
    if (steps[i] == 0 || steps[i] > 8) {
      return "an element stride is not from 1 to 8";
    }
  }
  return nullptr;
}

const char* find_fault_of_row(uint64_t bytes, CUtensorMapSwizzle swizzle) {
  if (bytes % 16 != 0) {
    return "the bytes of a box's row are no multiple of 16";
  }
  if (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && bytes > 16u << swizzle) {
    return "a box's row has more bytes than its swizzle";
  }
  return nullptr;
}

void pack(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* sizes,
          const cuuint64_t* strides, const cuuint32_t* steps, CUtensorMapSwizzle swizzle, TensorMap m) {
  m.magic = kMagic;
  m.type = static_cast<uint8_t>(type);
  m.rank = static_cast<uint8_t>(rank);
  m.swizzle = static_cast<uint8_t>(swizzle);
  m.data = static_cast<unsigned char*>(data);
  for (unsigned i = 0; i < rank; ++i) {
    m.last[i] = static_cast<uint32_t>(sizes[i] - 1);
    m.steps[i] = static_cast<uint8_t>(i == 0 ? 1 : steps[i]);
    if (i > 0) {
      m.strides[i - 1] = strides[i - 1];
    }
  }
  *map = {};
  std::memcpy(static_cast<void*>(map), &m, sizeof m);
}

CUresult refuse_map(const char* fault) {
  refuse(std::string("a tensor map that the driver does not take: ") + fault);
  return CUDA_ERROR_INVALID_VALUE;
}

// ---- the multiprocessor's ----

TensorMap read_map(const void* pointer) {
  if (number(pointer) % 64 != 0) {
    fail("a tensor map at an address that is no multiple of 64");
  }
  TensorMap m;
  std::memcpy(&m, pointer, sizeof m);
  if (m.magic != kMagic) {
    fail("a tensor map that was not encoded");
  }
  return m;
}

// Collects the bytes of a box row by row.
struct Collector {
  const TensorMap& map;
  const uint32_t shared;
  const bool write;
  Box box{};

  // x: the first element. index: of the other dimensions.
  void add_row(int64_t x, const int64_t (&index)[kMostRank]) {
    const uint32_t row = shared + box.bytes;
    box.bytes += map.row_bytes();
    unsigned char* from = map.data;
    for (unsigned i = 1; i < map.rank; ++i) {
      if (index[i] < 0 || index[i] > map.last[i]) {
        return;
      }
      from += static_cast<uint64_t>(index[i]) * map.strides[i - 1];
    }
    const int64_t first = std::max<int64_t>(x, 0), end = std::min<int64_t>(x + map.box[0], int64_t{map.last[0]} + 1);
    if (first >= end) {
      return;
    }
    const int64_t bytes = map.element_bytes();
    check_global(from + first * bytes, static_cast<size_t>((end - first) * bytes), "cp.async.bulk.tensor", 1, write);
    for (int64_t byte = (first - x) * bytes, next; byte < (end - x) * bytes; byte = next) {
      next = std::min(byte / 16 * 16 + 16, (end - x) * bytes);
      const uint32_t to = row + static_cast<uint32_t>(byte);
      box.pieces.push_back({map.span() == 0 ? to : swizzled(to, map.span()), from + x * bytes + byte,
                            static_cast<uint32_t>(next - byte)});
    }
  }

  void add_tile(const int* coordinates) {
    unsigned count[kMostRank], i[kMostRank] = {};
    for (unsigned d = 0; d < map.rank; ++d) {
      count[d] = (map.box[d] + map.steps[d] - 1u) / map.steps[d];
    }
    for (unsigned d = 0; d < map.rank;) {
      int64_t index[kMostRank] = {};
      for (d = 1; d < map.rank; ++d) {
        index[d] = int64_t{coordinates[d]} + i[d] * map.steps[d];
      }
      add_row(coordinates[0], index);
      for (d = 1; d < map.rank && ++i[d] == count[d]; ++d) {
        i[d] = 0;
      }
    }
  }

  void add_pixels(const int* coordinates, const uint16_t* offsets) {
    const unsigned images = map.rank - 1u;
    int64_t at[kMostRank] = {};
    for (unsigned d = 1; d < map.rank; ++d) {
      at[d] = coordinates[d];
      if (d < images && (at[d] < map.lower[d - 1] || at[d] > int64_t{map.last[d]} + map.upper[d - 1])) {
        fail("pixels from %d of dimension %u on, which is outside of the map's bounding box, from %d to %lld",
             coordinates[d], d, map.lower[d - 1], static_cast<long long>(int64_t{map.last[d]} + map.upper[d - 1]));
      }
      if (d < images && offsets[d - 1] >= 1u << 16 / (map.rank - 2)) {
        fail("an im2col offset of %u", unsigned{offsets[d - 1]});
      }
    }
    for (unsigned pixel = 0; pixel < map.box[1]; ++pixel) {
      int64_t index[kMostRank] = {};
      for (unsigned d = 1; d < map.rank; ++d) {
        index[d] = at[d] + (d < images ? offsets[d - 1] : 0);
      }
      add_row(coordinates[0], index);
      for (unsigned d = 1; d < map.rank; ++d) {
        at[d] += map.steps[d];
        if (d == images || at[d] <= int64_t{map.last[d]} + map.upper[d - 1]) {
          break;
        }
        at[d] = map.lower[d - 1];
      }
    }
  }
};

}  // namespace

void check_map(const void* map) { read_map(map); }

Box find_box(const void* pointer, unsigned rank, const int* coordinates, const uint16_t* offsets, uint32_t shared,
             bool write) {
  const TensorMap map = read_map(pointer);
  if (map.rank != rank || map.im2col != (offsets != nullptr)) {
    fail("cp.async.bulk.tensor of another rank or mode than its map's");
  }
  // Where rows are narrower than the swizzle, PTX does not say how far apart they are.
  if (map.span() != 0 && map.row_bytes() != map.span()) {
    fail("cp.async.bulk.tensor of rows of %u bytes, swizzled over %u: not emulated", map.row_bytes(), map.span());
  }
  const uint32_t alignment = std::max<uint32_t>(128, map.span() * 8);
  if (shared % alignment != 0) {
    fail("cp.async.bulk.tensor at %u of shared memory, which is no multiple of %u", shared - kSharedBase, alignment);
  }
  Collector collector{map, shared, write};
  collector.box.to_tf32 = !write && (map.type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 ||
                                     map.type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ);
  if (map.im2col) {
    collector.add_pixels(coordinates, offsets);
  } else {
    collector.add_tile(coordinates);
  }
  return std::move(collector.box);
}

void* driver_function(const char* name) {
  if (std::strcmp(name, "cuTensorMapEncodeTiled") == 0) {
    return reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  }
  if (std::strcmp(name, "cuTensorMapEncodeIm2col") == 0) {
    return reinterpret_cast<void*>(&cuTensorMapEncodeIm2col);
  }
  return nullptr;
}

}  // namespace emulated

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  using namespace emulated;
  const char* fault = find_fault(map, type, rank, data, sizes, strides, steps, interleave, swizzle, fill);
  if (fault != nullptr) {
    return refuse_map(fault);
  }
  TensorMap m{};
  for (unsigned i = 0; i < rank; ++i) {
    if (box[i] == 0 || box[i] > 256) {
      return refuse_map("a size of the box is not from 1 to 256");
    }
    m.box[i] = static_cast<uint16_t>(box[i]);
  }
  if ((fault = find_fault_of_row(uint64_t{box[0]} * bytes_of(type), swizzle)) != nullptr) {
    return refuse_map(fault);
  }
  pack(map, type, rank, data, sizes, strides, steps, swizzle, m);
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                                 const cuuint64_t* sizes, const cuuint64_t* strides, const int* lower, const int* upper,
                                 cuuint32_t channels, cuuint32_t pixels, const cuuint32_t* steps,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill fill) {
  using namespace emulated;
  const char* fault = find_fault(map, type, rank, data, sizes, strides, steps, interleave, swizzle, fill);
  if (fault != nullptr) {
    return refuse_map(fault);
  }
  if (rank < 3) {
    return refuse_map("the rank of im2col is not from 3 to 5");
  }
  if (channels == 0 || channels > 256 || pixels == 0 || pixels > 1024) {
    return refuse_map("channels per pixel are not from 1 to 256, or pixels per column not from 1 to 1024");
  }
  if ((fault = find_fault_of_row(uint64_t{channels} * bytes_of(type), swizzle)) != nullptr) {
    return refuse_map(fault);
  }
  TensorMap m{};
  m.im2col = true;
  m.box = {static_cast<uint16_t>(channels), static_cast<uint16_t>(pixels)};
  for (unsigned i = 0; i < rank - 2; ++i) {
    const int most = rank == 3 ? 32768 : rank == 4 ? 128 : 16;
    for (const int corner : {lower[i], upper[i]}) {
      if (corner < -most || corner >= most) {
        return refuse_map("a corner is further out than the rank allows");
      }
    }
    if (static_cast<int64_t>(sizes[i + 1]) + upper[i] - lower[i] <= 0) {
      return refuse_map("the bounding box is empty");
    }
    m.lower[i] = static_cast<int16_t>(lower[i]);
    m.upper[i] = static_cast<int16_t>(upper[i]);
  }
  pack(map, type, rank, data, sizes, strides, steps, swizzle, m);
  return CUDA_SUCCESS;
}
