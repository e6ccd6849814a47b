//! The range an invalidation names (section 2.4.3).

/// Pages an invalidation is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageRange {
    /// From one address to another, both inside.
    Span {
        /// First byte, page-aligned.
        first: u64,
        /// Last byte.
        last: u64,
    },
    /// The whole address space.
    Everything,
}

impl PageRange {
    /// From bits 63:12 of the address and the S bit: with S set, the lowest clear address bit tells the
    /// size, and where there is none below bit 51, everything is meant.
    #[must_use]
    pub const fn decode(page: u64, size: bool) -> Self {
        let address = page << 12;
        let shift = if size { page.trailing_ones() + 13 } else { 12 };
        if shift > 51 {
            return Self::Everything;
        }
        let within = (1 << shift) - 1;
        Self::Span {
            first: address & !within,
            last: address | within,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(first: u64, len: u64) -> PageRange {
        PageRange::Span {
            first,
            last: first + (len - 1),
        }
    }

    #[test]
    fn the_lowest_clear_bit_gives_the_size() {
        assert_eq!(PageRange::decode(0x1237, false), span(0x123_7000, 0x1000));
        assert_eq!(PageRange::decode(0x1236, true), span(0x123_6000, 0x2000));
        assert_eq!(PageRange::decode(0x1, true), span(0, 0x4000));
        assert_eq!(PageRange::decode(0x1237, true), span(0x123_0000, 0x1_0000));
    }

    #[test]
    fn every_code_for_everything_means_everything() {
        let everything = [0x7fff_ffff_ffff_f000, 0xffff_ffff_ffff_f000, 0x7_ffff_ffff_f000];
        for address in everything {
            assert_eq!(
                PageRange::decode(address >> 12, true),
                PageRange::Everything,
                "{address:#x}"
            );
        }
        assert_eq!(
            PageRange::decode(0x3_ffff_ffff_f000 >> 12, true),
            span(0, 1 << 51)
        );
    }

    #[test]
    fn a_single_page_may_be_the_last_one() {
        assert_eq!(
            PageRange::decode((1 << 52) - 1, false),
            span(0xffff_ffff_ffff_f000, 0x1000)
        );
    }
}
