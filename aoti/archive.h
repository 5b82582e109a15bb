// Whether a .pt2, which is a ZIP archive with nothing compressed, holds what was written. PyTorch's reader does not ask, and
// machine code that has changed ends the process, or computes something else.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

class Archive {
 public:
  explicit Archive(const std::string& path) : file_(path, std::ios::binary) {}

  // Throws for a file that is not whole, or where the checksum of a part is not what the archive says.
  void check() {
    const auto [entries, directory] = find_directory();
    uint64_t at = directory;
    for (uint64_t i = 0; i < entries; ++i) {
      const Bytes entry = read(at, 46);
      if (number(entry, 0, 4) != 0x02014b50) throw std::runtime_error("its directory is damaged");
      const uint64_t name_size = number(entry, 28, 2), extra_size = number(entry, 30, 2);
      const Bytes name = read(at + 46, name_size);
      const Bytes extra = read(at + 46 + name_size, extra_size);
      check_part({name.begin(), name.end()}, entry, extra);
      at += 46 + name_size + extra_size + number(entry, 32, 2);
    }
  }

 private:
  using Bytes = std::vector<uint8_t>;
  static constexpr uint64_t kLarge = 0xffffffff;  // the number is 64 bits wide, elsewhere

  // How many parts there are, and where the first one's entry is.
  std::pair<uint64_t, uint64_t> find_directory() {
    file_.seekg(0, std::ios::end);
    const auto size = static_cast<uint64_t>(std::max<std::streamoff>(file_.tellg(), 0));
    if (size < 22) throw std::runtime_error("it is not a ZIP archive");
    const Bytes end = read(size - 22, 22);
    if (number(end, 0, 4) != 0x06054b50) throw std::runtime_error("it is not a ZIP archive, or is not whole");
    if (number(end, 16, 4) != kLarge && number(end, 10, 2) != 0xffff) return {number(end, 10, 2), number(end, 16, 4)};
    const Bytes wide_end = read(number(read(size - 42, 20), 8, 8), 56);
    return {number(wide_end, 32, 8), number(wide_end, 48, 8)};
  }

  void check_part(const std::string& name, const Bytes& entry, const Bytes& extra) {
    uint64_t size = number(entry, 24, 4), at = number(entry, 42, 4);
    // Wide numbers stand one behind the other: the size, the size in the archive, which is the same, and the offset.
    for (uint64_t field = 0; field + 4 <= extra.size(); field += 4 + number(extra, field + 2, 2)) {
      if (number(extra, field, 2) != 1) continue;
      uint64_t wide = field + 4;
      if (size == kLarge) size = number(extra, wide, 8), wide += 8;
      if (number(entry, 20, 4) == kLarge) wide += 8;
      if (at == kLarge) at = number(extra, wide, 8);
    }
    const Bytes header = read(at, 30);
    at += 30 + number(header, 26, 2) + number(header, 28, 2);
    uint32_t crc = 0xffffffff;
    for (constexpr uint64_t kBlock = 1 << 20; size > 0;) {
      const Bytes block = read(at, std::min(size, kBlock));
      for (const uint8_t byte : block) crc = kTable[(crc ^ byte) & 0xff] ^ (crc >> 8);
      at += block.size();
      size -= block.size();
    }
    if ((crc ^ 0xffffffff) != number(entry, 16, 4)) throw std::runtime_error("its part " + name + " is damaged");
  }

  Bytes read(uint64_t at, uint64_t size) {
    Bytes bytes(size);
    file_.seekg(static_cast<std::streamoff>(at));
    if (!file_.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(size)))
      throw std::runtime_error("it is not whole");
    return bytes;
  }

  // Of so many bytes, the lowest first.
  static uint64_t number(const Bytes& bytes, uint64_t at, int size) {
    uint64_t value = 0;
    for (int i = size; i-- > 0;) value = value << 8 | bytes.at(at + static_cast<uint64_t>(i));
    return value;
  }

  static constexpr std::array<uint32_t, 256> kTable = [] {
    std::array<uint32_t, 256> table{};
    for (uint32_t i = 0; i < 256; ++i) {
      table[i] = i;
      for (int bit = 0; bit < 8; ++bit) table[i] = (table[i] >> 1) ^ (table[i] & 1 ? 0xedb88320 : 0);
    }
    return table;
  }();

  std::ifstream file_;
};
