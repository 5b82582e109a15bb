// The same where windows move by single pixels: of each slice of channels a tile's pixels are fetched once, with all that their
// windows reach, and a tap multiplies those that lie a fixed number of rows further on.
//
// For that, pixels are counted with the padding behind each row and image, as if it were between them. What is computed for the
// padding itself is not stored.
#pragma once

#include "consumer.cuh"
#include "kernels/ptx/cp_async.cuh"
#include "producer.cuh"

namespace fused_conv_bn::gemm_sm90 {

// The thread that fetches pixels, or one that fetches filters. kFilters: which of them.
template <typename T, int kTile, bool kFilters, bool kGrouped>
struct HaloProducer {
  const Block<T, kTile>& block;
  const Fetcher<T, kTile, kGrouped> fetcher;
  const Params<T>& p = block.p;
  Ring ring{};

  __device__ __forceinline__ void fetch_pixels_of(int first) {
    const Layout& l = p.layout;
    auto rest = static_cast<uint32_t>(first);
    const int image = static_cast<int>(div_mod(p.image_pixels, rest));
    const int row = static_cast<int>(div_mod(p.columns, rest)) - p.pad_h, column = static_cast<int>(rest) - p.pad_w;
#pragma unroll 1
    for (int slice = 0; slice < l.slices; ++slice) {
      barrier_wait(block.empty(ring.stage), ring.parity ^ 1);
      barrier_arrive_expect(block.full(ring.stage), l.pixel_bytes);
      fetch_pixels(block.pixels_of(ring.stage), p.x, fetcher.first_channel() + slice * l.depth, column, row, image, 0,
                   0, block.full(ring.stage));
      ring.advance(l.stages);
    }
  }

  __device__ __forceinline__ void fetch_filters() {
    const Layout& l = p.layout;
    const int taps = p.R * p.S;
    int step = 0;
#pragma unroll 1
    for (int slice = 0; slice < l.slices; ++slice) {
#pragma unroll 1
      for (int tap = 0; tap < taps; ++tap, ++step) {
        const int place = l.resident ? step : ring.stage;
        if (!l.resident) {
          barrier_wait(block.spare(place), ring.parity ^ 1);
          ring.advance(l.filter_stages);
        }
        if (fetcher.number == 0) {
          barrier_arrive_expect(block.filters(place), l.filter_bytes);
        }
        fetcher.fetch_filters(block.filters_at(place), slice * l.depth, tap, block.filters(place));
      }
    }
  }

  __device__ __forceinline__ void run() {
    const int tiles = kFilters && p.layout.resident ? 1 : block.tiles();
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      if constexpr (kFilters) {
        fetch_filters();
      } else {
        fetch_pixels_of(block.first_pixel(tile));
      }
    }
  }
};

template <typename T, int kTile>
struct HaloConsumer : Consumer<T, kTile> {
  using Base = Consumer<T, kTile>;
  using Base::block, Base::consumer, Base::p, Base::products, Base::ring, Base::thread;
  static constexpr int kChunks = Base::kFilters * Base::kBytes / 16;  // of a pixel's results
  static constexpr int kRowsAtOnce = 128 / kChunks;
  Ring filter_ring{};

  __device__ __forceinline__ HaloConsumer(const Block<T, kTile>& block, int consumer) : Base{block, consumer} {}

  // next: another consumer's tile follows.
  template <int kStepBytes>
  __device__ __forceinline__ void multiply_tile(bool first_tile, bool next) {
    const Layout& l = p.layout;
    products.clear();
    const int taps = p.R * p.S;
    int tap = 0, row = 0, column = 0, previous = 0, previous_filters = 0;
#pragma unroll 1
    for (int step = 0; step < l.steps; ++step) {
      const int place = l.resident ? step : filter_ring.stage;
      if (tap == 0) {
        barrier_wait(block.full(ring.stage), ring.parity);
      }
      if (!l.resident || first_tile) {
        barrier_wait(block.filters(place), filter_ring.parity);
      }
      if (next && step + 1 == l.steps) {
        __syncwarp();
        arrive_as_warp(block.turn(1 - consumer));
      }
      products.template start<kStepBytes>(block.pixels_of(ring.stage) + (row + column) * kStepBytes,
                                          block.filters_at(place));
      if (step > 0) {
        product_wait<1>();
        if (!l.resident) {
          arrive_as_warp(block.spare(previous_filters));
        }
        if (tap == 0) {
          arrive_as_warp(block.empty(previous));
        }
      }
      previous_filters = place;
      if (!l.resident) {
        filter_ring.advance(l.filter_stages);
      }
      column += p.dilation_w;
      if (column == p.tap_columns) {
        column = 0;
        row += p.tap_row;
      }
      if (++tap == taps) {
        tap = row = 0;
        previous = ring.stage;
        ring.advance(l.stages);
      }
    }
    products.finish();
    arrive_as_warp(block.empty(previous));
    if (!l.resident) {
      arrive_as_warp(block.spare(previous_filters));
    }
  }

  // Of the output, by its number with the padding; -1 for padding.
  __device__ __forceinline__ int64_t pixel_of(int padded) const {
    auto rest = static_cast<uint32_t>(padded);
    const auto image = static_cast<int>(div_mod(p.image_pixels, rest));
    const auto y = static_cast<int>(div_mod(p.columns, rest)), x = static_cast<int>(rest);
    return padded < p.pixels && y < p.H && x < p.W ? (static_cast<int64_t>(image) * p.H + y) * p.W + x : -1;
  }

  // f(place in shared memory, element of the tensor) for what the thread has of the tile from `first` on, and of what there is.
  template <typename F>
  __device__ __forceinline__ void for_chunks(int first, F&& f) const {
    constexpr int kElements = 16 / Base::kBytes;
    const int chunk = thread % kChunks, filter = block.first_filter() + chunk * kElements;
#pragma unroll
    for (int i = 0; i < Base::kPixels / kRowsAtOnce; ++i) {
      const int row = thread / kChunks + i * kRowsAtOnce;
      const int64_t pixel = pixel_of(first + row);
      if (filter < p.filters && pixel >= 0) {
        f(this->place_of_chunk(row, chunk), pixel * p.filters + filter);
      }
    }
  }

  __device__ __forceinline__ void run() {
    const Layout& l = p.layout;
    const int tiles = block.tiles();
    const auto skip_tile = [&] {
      ring.skip(p.stage_rounds, p.stage_rest, l.stages);
      if (!l.resident) {
        filter_ring.skip(p.filter_rounds, p.filter_rest, l.filter_stages);
      }
    };
    if (consumer > 0) {
      skip_tile();
    }
    this->output = block.output(consumer, 0);
#pragma unroll 1
    for (int tile = consumer, round = 0; tile < tiles; tile += kConsumers, ++round) {
      const int first = block.first_pixel(tile);
      if (p.has_residual) {
        this->sync();  // nobody reads the results before
        for_chunks(first, [&](uint32_t at, int64_t element) { copy_async(at, p.residual_data + element, true); });
        copy_async_commit();
      }
      if (tile > 0) {
        barrier_wait(block.turn(consumer), (tile - 1) / kConsumers & 1);
      }
      Products<T, kTile>::with_row_bytes(
          l.depth, [&]<int kStepBytes>() { multiply_tile<kStepBytes>(round == 0, tile + 1 < tiles); });
      skip_tile();
      copy_async_wait_all_but<0>();
      this->sync();
#pragma unroll
      for (int m = 0; m < Base::kM; ++m) {
        this->finish(m);
      }
      this->sync();
      for_chunks(first, [&](uint32_t at, int64_t element) { store_words(p.y_data + element, load_shared_4(at)); });
      if (p.moments != nullptr) {
        this->moments.add(
            p.pixels - first, [&](int row, int filter) { return this->place_of_filter(row, filter); },
            [&](int row) { return pixel_of(first + row) >= 0; });
      }
    }
    if (p.moments != nullptr) {
      this->sync();
      this->moments.write(block, consumer, this->output, [&] { this->sync(); });
    }
  }
};

}  // namespace fused_conv_bn::gemm_sm90
