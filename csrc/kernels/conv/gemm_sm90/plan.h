// gemm_sm90: any convolution in channels_last of 16 bits, or of float32 by TF32 products, as a product of matrices, with its
// epilogue, on the tensor cores of compute capability 9.0a (tensor maps, wgmma).
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <optional>
#include <string>

#include "kernels/batch_norm/moments.h"
#include "kernels/conv/problem.h"

namespace fused_conv_bn {
namespace gemm_sm90 {

constexpr int kConsumers = 2;                     // warpgroups that have tiles, in turns
constexpr int kThreads = 128 * (1 + kConsumers);  // and one that fetches what they multiply
constexpr int kMostStages = 12;
constexpr int kMostResident = 40;  // steps whose filters may stay in shared memory
constexpr int kMostFilters = 256;  // of a tile
constexpr int kMostSplits = 4;     // blocks of a cluster; 8 were seldom faster
constexpr int kHeaderBytes = 3072;
constexpr int kWarpPixels = 16;  // of a product

// A tile of the product: a consumer's pixels by filters. Consumers have tiles in turns, or work together, on one behind the other.
struct TileShape {
  int pixels, filters;
  int blocks;  // that a multiprocessor is to have at a time
  bool together;
  bool is_shared;  // a cluster may share a tile's steps
  bool has_halo;   // and a block may fetch pixels once for all taps
  bool is_wide;    // results of 4 bytes leave too little room for stages

  constexpr int block_pixels() const { return pixels * (together ? kConsumers : 1); }
  constexpr int out_bytes(int element_bytes) const { return pixels * filters * element_bytes; }
  constexpr int sum_bytes() const { return pixels * filters * 4; }
  // A consumer with more results of 4 bytes would not have registers for all that it keeps of a halo.
  constexpr bool has_halo_of(int element_bytes) const { return has_halo && out_bytes(element_bytes) <= 32768; }
};
constexpr TileShape kTiles[] = {
    {128, 128, 1, false, true, true, false}, {64, 256, 1, false, false, false, true},
    {128, 64, 1, false, true, true, false},  {128, 32, 2, false, false, true, false},
    {64, 64, 2, false, false, false, false}, {64, 64, 1, false, true, false, false},
    {128, 128, 1, true, false, false, true}, {128, 64, 1, true, false, false, false},
};
constexpr int kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);

// A step is a tap's channels, at most so many that a pixel's are 128 bytes. A stage of the pipeline has those of a tile's
// pixels and filters; the filters may lie apart instead, all steps of them, where a block fetches them only once.
//
// Where there are few tiles, the blocks of a cluster share the steps of one.
struct Layout {
  int tile;       // of kTiles
  int depth;      // channels of a step: 128, 64 or 32 bytes of a pixel
  int slices;     // steps of a tap
  int steps;      // of the whole filter
  int of_group;   // filters of a tile that are of one group, and are fetched together
  int splits;     // blocks of a cluster
  bool resident;  // filters lie apart
  bool halo;      // a stage has the pixels of all taps, and filters have stages of their own unless they are resident
  int stages;
  int filter_stages;
  int buffers;            // of a consumer, for its results
  int blocks_of_filters;  // blocks, or clusters, that have the same filters
  // In bytes.
  int pixel_bytes, filter_bytes, stage_bytes;
  int at_resident, at_output;  // behind the header and the stages
  int shared_memory;
};

inline bool supports(const Conv2d& c, const GpuTraits& gpu) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const auto fits_map = [](int64_t stride, int64_t pad, int64_t reach) {
    // Of the window's first tap: from -pad on, and pad - reach behind the last pixel at most, each from -128 to 127.
    return stride <= 8 && pad <= 128 && pad - reach <= 127 && reach - pad <= 128 && reach <= 255;
  };
  const bool has_products = c.element_bytes == 2 || (c.element_bytes == 4 && c.allow_tf32);
  const bool has_groups = c.groups == 1 || (c.C / c.groups * c.element_bytes % 16 == 0 && c.K / c.groups % 8 == 0);
  return gpu.has_wgmma && c.channels_last && has_products && has_groups && c.C >= 1 && c.K >= 1 && c.N >= 1 &&
         c.P >= 1 && c.Q >= 1 && c.C * c.element_bytes % 16 == 0 && c.K * c.element_bytes % 16 == 0 && c.R >= 1 &&
         c.S >= 1 && fits_map(c.stride_h, c.pad_h, c.R == 1 ? 0 : c.dilation_h * (c.R - 1)) &&
         fits_map(c.stride_w, c.pad_w, c.S == 1 ? 0 : c.dilation_w * (c.S - 1)) && c.N * c.P * c.Q <= kMost &&
         c.N * c.H * c.W <= kMost && c.C <= kMost && c.K <= kMost && c.C * c.R * c.S <= kMost;
}

// Whether x is a matrix of pixels by channels: a tap, a pixel.
inline bool is_flat(const Conv2d& c) {
  return c.R == 1 && c.S == 1 && c.stride_h == 1 && c.stride_w == 1 && c.pad_h == 0 && c.pad_w == 0;
}

// Whether pixels may be multiplied by gates on their way. In TF32 they have been rounded before.
inline bool takes_gates(const Conv2d& c) { return is_flat(c) && c.element_bytes == 2 && c.N * c.C < int64_t{1} << 31; }

// With groups a tile multiplies the channels of all groups that it has filters of, as if it were without: in the channels of other
// groups a filter is zero, as its box is outside of the tensor. Then so many filters have one group, and a box:
inline int64_t filters_of_group(const Conv2d& c, const TileShape& t) {
  return c.groups == 1 ? t.filters : std::gcd(c.K / c.groups, int64_t{t.filters});
}

// And so many channels are multiplied: of a tile that begins with the last such filters of a group.
inline int64_t channels_of_tile(const Conv2d& c, const TileShape& t) {
  const int64_t filters = c.K / c.groups;
  return std::min(c.groups, ceil_div(filters - filters_of_group(c, t) + t.filters, filters)) * (c.C / c.groups);
}

constexpr int kFilterFetchers = 3;  // threads that fetch a step's filters, in turns where they are several boxes

// The pixels of a convolution whose output is as large as its input, counted with the padding that is behind each row and each
// image: that of its other side as well.
struct Padded {
  int64_t pitch, image, pixels;

  explicit Padded(const Conv2d& c) : pitch(c.W + c.pad_w), image((c.H + c.pad_h) * pitch), pixels(c.N * image) {}
};

// What of them a tile's windows reach.
inline int64_t halo_rows(const Conv2d& c, const TileShape& t) {
  return round_up(t.pixels + 2 * (c.pad_h * Padded(c).pitch + c.pad_w), 8);
}

inline bool supports_halo(const Conv2d& c) {
  const auto keeps_size = [](int64_t stride, int64_t pad, int64_t reach) { return stride == 1 && 2 * pad == reach; };
  return c.R * c.S > 1 && keeps_size(c.stride_h, c.pad_h, c.dilation_h * (c.R - 1)) &&
         keeps_size(c.stride_w, c.pad_w, c.dilation_w * (c.S - 1)) && Padded(c).pixels <= int64_t{1} << 30;
}

inline int64_t count_pixels(const Conv2d& c, const Layout& l) { return l.halo ? Padded(c).pixels : c.N * c.P * c.Q; }

// Tiles of a block, and how many of them a consumer has.
inline int64_t tiles_of_block(const Conv2d& c, const Layout& l) {
  return ceil_div(ceil_div(count_pixels(c, l), kTiles[l.tile].block_pixels()), l.blocks_of_filters);
}
inline int64_t rounds_of_consumer(const Conv2d& c, const Layout& l) {
  return kTiles[l.tile].together ? tiles_of_block(c, l) : ceil_div(tiles_of_block(c, l), kConsumers);
}

// Bytes of a pixel in a step: as many as the channels have, up to 128. Where they end within the last step of a tap, half as many
// may be less work.
constexpr int kMostRowBytes = 128, kFewestRowBytes = 32;

inline int row_bytes_of(const Conv2d& c, const TileShape& t) {
  const uint64_t bytes = std::bit_ceil(static_cast<uint64_t>(channels_of_tile(c, t) * c.element_bytes));
  return static_cast<int>(std::clamp<uint64_t>(bytes, kFewestRowBytes, kMostRowBytes));
}

inline Layout steps_of(const Conv2d& c, int tile, int row_bytes) {
  Layout l{};
  l.tile = tile;
  l.depth = row_bytes / c.element_bytes;
  l.slices = static_cast<int>(ceil_div(channels_of_tile(c, kTiles[tile]), l.depth));
  l.steps = static_cast<int>(c.R * c.S * l.slices);
  l.of_group = static_cast<int>(filters_of_group(c, kTiles[tile]));
  l.pixel_bytes = kTiles[tile].block_pixels() * row_bytes;
  l.filter_bytes = kTiles[tile].filters * row_bytes;
  return l;
}

// Each block has one tile after another.
inline std::optional<Layout> lay_out(const Conv2d& c, const GpuTraits& gpu, int tile, int row_bytes) {
  constexpr int kFewStages = 4, kReserved = 1024;  // reserved: of each block, by the system
  const TileShape& t = kTiles[tile];
  if (t.is_wide && c.element_bytes > 2) {
    return std::nullopt;
  }
  const int memory = std::min(gpu.shared_memory_per_block, gpu.shared_memory_per_multiprocessor / t.blocks - kReserved);
  Layout l = steps_of(c, tile, row_bytes);
  l.splits = 1;
  // As many stages as there is room for; whether these are so many at least.
  const auto fill = [&](bool resident, int buffers, int least) {
    const int apart = resident ? l.steps * l.filter_bytes : 0;
    const int fixed = kHeaderBytes + apart + kConsumers * buffers * t.out_bytes(c.element_bytes);
    l.resident = resident;
    l.buffers = buffers;
    l.stage_bytes = l.pixel_bytes + (resident ? 0 : l.filter_bytes);
    l.stages = std::min(kMostStages, (memory - fixed) / l.stage_bytes);
    l.at_resident = kHeaderBytes + l.stages * l.stage_bytes;
    l.at_output = l.at_resident + apart;
    l.shared_memory = fixed + l.stages * l.stage_bytes;
    return l.stages >= least;
  };
  const int64_t filter_tiles = ceil_div(c.K, t.filters), pixel_tiles = ceil_div(c.N * c.P * c.Q, t.block_pixels());
  l.blocks_of_filters = static_cast<int>(
      std::clamp<int64_t>(gpu.multiprocessors * t.blocks / filter_tiles, 1, pixel_tiles));
  const bool may_stay = l.steps <= kMostResident && pixel_tiles > l.blocks_of_filters;
  if (!(may_stay && fill(true, 2, kFewStages)) && !(may_stay && fill(true, 1, kFewStages)) &&
      !fill(false, 2, kFewStages) && !fill(false, 1, 2)) {
    return std::nullopt;
  }
  return l;
}

// With the pixels of all taps in a stage.
inline std::optional<Layout> lay_out_halo(const Conv2d& c, const GpuTraits& gpu, int tile, int row_bytes) {
  constexpr int kMostRows = 1024, kFewFilters = 3;  // rows: of a box
  const TileShape& t = kTiles[tile];
  if (!t.has_halo_of(c.element_bytes) || !supports_halo(c) || halo_rows(c, t) > kMostRows) {
    return std::nullopt;
  }
  Layout l = steps_of(c, tile, row_bytes);
  l.splits = l.buffers = 1;
  l.halo = true;
  l.pixel_bytes = static_cast<int>(halo_rows(c, t)) * l.depth * c.element_bytes;
  l.stage_bytes = static_cast<int>(round_up(l.pixel_bytes, 1024));
  const int64_t filter_tiles = ceil_div(c.K, t.filters), pixel_tiles = ceil_div(count_pixels(c, l), t.pixels);
  l.blocks_of_filters = static_cast<int>(std::clamp<int64_t>(gpu.multiprocessors / filter_tiles, 1, pixel_tiles));
  const int all = l.steps * l.filter_bytes;
  const int room = gpu.shared_memory_per_block - kHeaderBytes - kConsumers * t.out_bytes(c.element_bytes);
  l.resident = l.steps <= kMostResident && all + 2 * l.stage_bytes <= room;
  if (!l.resident) {
    l.filter_stages = std::min(kMostStages, (room - 2 * l.stage_bytes) / l.filter_bytes);
    if (l.filter_stages < kFewFilters) {
      return std::nullopt;
    }
  }
  const int apart = l.resident ? all : l.filter_stages * l.filter_bytes;
  l.stages = std::min(kMostStages, (room - apart) / l.stage_bytes);
  l.at_resident = kHeaderBytes + l.stages * l.stage_bytes;
  l.at_output = l.at_resident + apart;
  l.shared_memory = l.at_output + kConsumers * t.out_bytes(c.element_bytes);
  return l;
}

// Each cluster has one tile, whose consumers have every second step: the number of stages is even, so that each has its own.
inline std::optional<Layout> lay_out_split(const Conv2d& c, const GpuTraits& gpu, int tile, int splits, int row_bytes) {
  const TileShape& t = kTiles[tile];
  Layout l = steps_of(c, tile, row_bytes);
  l.splits = splits;
  l.stage_bytes = l.pixel_bytes + l.filter_bytes;
  const int room = std::min(kMostStages, (gpu.shared_memory_per_block - kHeaderBytes) / l.stage_bytes) / 2 * 2;
  l.stages = std::min(room, static_cast<int>(round_up(ceil_div(l.steps, splits), 2)));
  l.at_resident = l.at_output = kHeaderBytes;  // the sums of both consumers take the place of the stages
  l.shared_memory = kHeaderBytes + std::max(l.stages * l.stage_bytes, kConsumers * t.sum_bytes());
  l.blocks_of_filters = static_cast<int>(ceil_div(c.N * c.P * c.Q, t.pixels));
  // A consumer gives a stage back while it has the next one.
  const bool turns = l.stages >= 2 * kConsumers || ceil_div(l.steps, splits) <= l.stages;
  const bool fits = t.is_shared && l.stages >= 2 && turns && l.shared_memory <= gpu.shared_memory_per_block &&
                    l.steps >= splits * kConsumers && t.filters / 8 >= splits;
  return fits ? std::optional(l) : std::nullopt;
}

// What estimate() takes, of an H200: times in microseconds, and bytes per microsecond. Fitted to 14,000 times of 1108 layers of ten
// networks at batch 1 to 128, in all layouts: the layout of the least estimate takes 1.02 times the time of the best, in one case of
// twenty more than 1.12. What groups add was fitted to 3,000 times of 172 grouped layers of ResNeXt and RegNet at batch 1, 32 and 64:
// 1.04 times, in one case of eight more than 1.12.
struct Rates {
  double products = 7.66e6;  // a multiprocessor's: pixels by filters by bytes of a row
  double fetches = 118e3;    // a multiprocessor's
  double rows = 1198;        // the same, rows of whatever bytes
  double l2 = 14.35e6;
  double memory = 3.64e6;
  double output = 33e3;      // a consumer's
  double stage = 0.533;      // a step, by the number of stages
  double step = 0.097;       // at least
  double halo_stage = 1.63;  // a slice of pixels with halos, by the number of stages
  double halo_fetch = 1.3;   // as many times as long as another fetch
  double box = 0.15;         // of filters, where a step has several: of each thread that fetches them
  double across = 1.2;       // how much longer a fetch takes where 128 bytes of a pixel lie across two rows
  double tile = 0.111;       // a consumer's
  double halo_tile = 0.37;   // more, where threads write the results
  double split = 0.058, of_splits = 0.115, exchange = 30.8e3;
  double kernel = 2.27;
  double together = 2.745;  // how much of the longest alone counts: the exponent of a norm
};

// With groups, whether a step's channels of a pixel begin within a row of as many.
inline bool lies_across(const Conv2d& c, const Layout& l) {
  const int64_t filters = c.K / c.groups, of_tile = kTiles[l.tile].filters;
  const int64_t whole = of_tile % filters == 0 ? of_tile / filters : 1;  // groups from a tile's first to the next one's
  return c.groups > 1 && (c.C % l.depth != 0 || whole * (c.C / c.groups) % l.depth != 0);
}

// An estimate of the time in microseconds on an H200: what a multiprocessor has to multiply, fetch and send out, what a consumer
// has to wait for, L2 and memory, of which the longest counts most.
inline double estimate(const Conv2d& c, const GpuTraits& gpu, const Layout& l) {
  constexpr Rates kRates;
  const TileShape& t = kTiles[l.tile];
  const auto number = [](int64_t value) { return static_cast<double>(value); };
  const int64_t filter_tiles = ceil_div(c.K, t.filters);
  const int64_t blocks = filter_tiles * l.blocks_of_filters * l.splits;
  // Not all multiprocessors can have a block of a larger cluster.
  const int64_t at_a_time = l.halo          ? gpu.multiprocessors
                            : l.splits == 1 ? int64_t{gpu.multiprocessors} * t.blocks
                            : l.splits == 2 ? gpu.multiprocessors
                                            : std::max(1, gpu.multiprocessors * 10 / 11);
  const int64_t tiles = tiles_of_block(c, l);
  const int64_t neighbours = l.splits == 1 && !l.halo
                                 ? std::min<int64_t>(ceil_div(blocks, gpu.multiprocessors), t.blocks)
                                 : 1;
  const double steps = number(ceil_div(l.steps, l.splits)), row_bytes = l.depth * c.element_bytes;
  // With few filters an instruction waits for its pixels, which come from shared memory as well.
  const double filters = std::max(t.filters, 32 + t.filters / 2);
  const double products = t.block_pixels() * filters * row_bytes * steps / kRates.products;
  const double fetched = (l.halo ? l.slices : steps) * l.pixel_bytes +
                         steps * (l.resident ? l.filter_bytes / number(tiles) : l.filter_bytes);
  const double fetch = (l.halo ? kRates.halo_fetch : 1) *
                       (lies_across(c, l) ? 1 + kRates.across * row_bytes / 128 : 1) *
                       std::max(fetched / kRates.fetches, fetched / row_bytes / kRates.rows);
  const double output = t.out_bytes(c.element_bytes) * (t.together ? kConsumers : 1) / kRates.output;
  const double machine = number(tiles * neighbours) * std::max(products, fetch) + output;
  const auto step = [&](int stages) { return std::max(kRates.stage / stages, kRates.step); };
  const double wait = l.halo ? steps * (l.resident ? kRates.step : step(l.filter_stages)) +
                                   l.slices * kRates.halo_stage / l.stages
                             : steps * step(l.stages);
  const double waits = wait * number(t.together ? 1 : std::min<int64_t>(tiles, kConsumers));
  const double consumer = number(rounds_of_consumer(c, l)) *
                          (std::max(waits, products) + kRates.tile + (l.halo ? kRates.halo_tile : 0) + output);
  const double window = std::min(1.0, number(c.R * c.S) / number(c.stride_h * c.stride_w));
  const double elements = number(c.N * c.H * c.W * c.C) * window + number(c.N * c.P * c.Q * c.K) +
                          number(c.K * c.C / c.groups * c.R * c.S);
  const double memory = c.element_bytes * elements / kRates.memory;
  const double l2 = number(blocks * tiles) * fetched / kRates.l2;
  const int boxes = t.filters / l.of_group;
  const double issue = boxes == 1 ? 0
                                  : kRates.box * number(ceil_div(boxes, kFilterFetchers)) * steps *
                                        (l.resident ? 1 : number(tiles));
  double sum = 0;
  for (const double part : {machine, consumer, memory, l2, issue}) {
    sum += std::pow(part, kRates.together);
  }
  sum = std::pow(sum, 1 / kRates.together);
  const double exchange = l.splits == 1 ? 0
                                        : kRates.split + kRates.of_splits * l.splits +
                                              t.block_pixels() * t.filters * 8 / kRates.exchange;
  return kRates.kernel + number(ceil_div(blocks, at_a_time)) * sum + exchange;
}

inline std::optional<Layout> best_layout(const Conv2d& c, const GpuTraits& gpu) {
  std::optional<Layout> best;
  double least = 0;
  const auto consider = [&](const std::optional<Layout>& l) {
    if (const double time = l.has_value() ? estimate(c, gpu, *l) : 0; l.has_value() && (!best || time < least)) {
      best = l;
      least = time;
    }
  };
  for (int tile = 0; tile < kTileCount; ++tile) {
    int row_bytes = row_bytes_of(c, kTiles[tile]);
    for (int i = 0; i < 2 && row_bytes >= kFewestRowBytes; ++i, row_bytes /= 2) {
      consider(lay_out(c, gpu, tile, row_bytes));
      consider(lay_out_halo(c, gpu, tile, row_bytes));
      for (int splits = 2; splits <= kMostSplits; splits *= 2) {
        consider(lay_out_split(c, gpu, tile, splits, row_bytes));
      }
    }
  }
  return best;
}

}  // namespace gemm_sm90

struct GemmSm90 {
  static constexpr const char* kName = "gemm_sm90";
  static constexpr GathersMoments kGathersMoments = GathersMoments::with_results;

  gemm_sm90::Layout layout;

  static std::optional<GemmSm90> make(const Conv2d& c, const GpuTraits& gpu) {
    const auto layout = gemm_sm90::supports(c, gpu) ? gemm_sm90::best_layout(c, gpu) : std::nullopt;
    return layout.has_value() ? std::optional(GemmSm90{*layout}) : std::nullopt;
  }

  // Measured on an H200 for the layers of ten networks, batch 1 to 128. PyTorch's is faster where tiles are few and long, or long
  // and partly empty, unless pixels are fetched once; in TF32 where many are long. Fewer than 16 channels are for stems. In
  // training what it gathers takes time: there it is faster where a result has few terms.
  bool is_faster(const Conv2d& c, bool train) const {
    if (c.groups > 1) {
      return is_faster_with_groups(c, train);
    }
    constexpr int64_t kTile = 128;
    const int64_t tiles = ceil_div(c.N * c.P * c.Q, kTile) * ceil_div(c.K, kTile);
    const int64_t room = int64_t{layout.slices} * layout.depth * round_up(c.K, gemm_sm90::kTiles[layout.tile].filters);
    const bool is_1x1 = c.R * c.S == 1, is_tf32 = c.element_bytes == 4;
    const int steps = layout.steps;
    bool slower = false;
    if (train) {
      constexpr int64_t kFewTerms = 256, kManyPixels = 6272;
      slower = !is_1x1 || c.C > kFewTerms || c.N * c.P * c.Q < kManyPixels || (c.C >= 160 && c.K > 4 * c.C);
    } else if (layout.halo) {
      slower = (steps >= 36 && tiles >= 3000) || (steps >= 64 && tiles >= 24 && tiles < 40);
    } else if (is_tf32) {
      slower = tiles >= 196 && steps >= (is_1x1 ? 32 : 18);
    } else if (is_1x1) {
      slower = (steps >= 32 && tiles >= 24 && tiles < 104) || (steps >= 12 && tiles >= 96 && c.C * c.K * 6 < room * 5);
    } else {
      slower = (steps >= 64 && tiles >= 24 && tiles < 264) || (steps >= 18 && tiles >= 196 && c.C * c.K * 5 < room * 4);
    }
    return c.C >= 16 && !slower;
  }

  // The same for grouped layers of ResNeXt and RegNet: 0.1 to 0.95 of PyTorch's time, but where groups are narrow and begin anywhere.
  bool is_faster_with_groups(const Conv2d& c, bool train) const {
    const int64_t channels = c.C / c.groups, pixels = c.N * c.P * c.Q;
    const bool across = gemm_sm90::lies_across(c, layout);
    if (train) {
      constexpr int64_t kManyPixels = 6272;
      return c.element_bytes == 2 && channels >= 24 && (across || pixels >= kManyPixels);
    }
    constexpr int64_t kNarrow = 8, kManyChannels = 200, kManyPixels = 1000;
    return !(across && !layout.halo && channels <= kNarrow && c.C >= kManyChannels && pixels >= kManyPixels);
  }

  bool takes_gates(const Conv2d& c) const { return gemm_sm90::takes_gates(c); }
  // In microseconds on an H200: what a step of 64 pixels takes longer with gates, against a pass of their own. Wrong for 4 of 120
  // layers of EfficientNet, MobileNetV3 and RegNetY at batch 1 to 128, which take 1.16 times as long at most.
  bool has_faster_gates(const Conv2d& c) const {
    constexpr double kStep = 0.16, kPass = 1.8, kByte = 0.36e-6;
    constexpr int kPixels = 64;
    const int64_t steps = gemm_sm90::rounds_of_consumer(c, layout) * ceil_div(layout.steps, layout.splits);
    const double longer = kStep *
                          static_cast<double>(steps * (gemm_sm90::kTiles[layout.tile].block_pixels() / kPixels));
    return longer < kPass + kByte * static_cast<double>(c.N * c.H * c.W * c.C * c.element_bytes);
  }

  ConvRequirements requirements(const Conv2d&) const {
    return {.alignment = 16, .dense_weight = true, .channels_last_weight = true};
  }

  std::string describe() const {
    const gemm_sm90::TileShape& t = gemm_sm90::kTiles[layout.tile];
    return std::string(kName) + " " + std::to_string(t.filters) + " channels by " + std::to_string(t.block_pixels()) +
           " pixels" + (layout.halo ? " and what their windows reach" : "") +
           (layout.resident ? ", weights in shared memory" : "") +
           (layout.splits > 1 ? ", channels in " + std::to_string(layout.splits) + " parts" : "");
  }

  // Moments of each channel that launch_with_moments() puts out: of each consumer, or of what a warp finishes of a split tile.
  int64_t partials(const Conv2d&, const GpuTraits&) const {
    const int of_tile = gemm_sm90::kTiles[layout.tile].pixels / gemm_sm90::kWarpPixels;
    return int64_t{layout.blocks_of_filters} * (layout.splits == 1 ? gemm_sm90::kConsumers : of_tile);
  }

#if defined(__CUDACC__)
  template <typename T>
  cudaError_t launch(const ConvCall& call, cudaStream_t stream) const;
  template <typename T>
  cudaError_t launch_with_moments(const ConvCall& call, Moments* moments, cudaStream_t stream) const;
#endif
};

}  // namespace fused_conv_bn
