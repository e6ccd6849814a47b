//! Calendar dates, and the row of registers that holds one.
//!
//! The proleptic Gregorian calendar in UTC, for the years that four decimal digits hold.

const SECONDS_PER_DAY: i64 = 86_400;
/// Days from 0000-03-01 to 1970-01-01.
const DAYS_TO_1970: i64 = 719_468;
/// Days in 400 years, after which the calendar repeats.
const DAYS_PER_ERA: i64 = 146_097;

/// A second of a calendar day.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Date {
    /// 0 to 9999.
    pub(super) year: u16,
    /// 1 to 12.
    pub(super) month: u8,
    /// 1 to 31.
    pub(super) day: u8,
    /// 0 to 23.
    pub(super) hour: u8,
    /// 0 to 59.
    pub(super) minute: u8,
    /// 0 to 59.
    pub(super) second: u8,
}

fn small(value: i64) -> u8 {
    u8::try_from(value).expect("a field of a date has two digits")
}

impl Date {
    /// The date `seconds` after 1970-01-01 00:00:00; years outside 0 to 9999 wrap around.
    pub(super) fn from_unix(seconds: i64) -> Self {
        let (days, of_day) = (
            seconds.div_euclid(SECONDS_PER_DAY),
            seconds.rem_euclid(SECONDS_PER_DAY),
        );
        // Counted from a first of March, the leap day is the last of its year and months have a regular
        // length: five of them are 153 days.
        let from_march = days + DAYS_TO_1970;
        let (era, of_era) = (
            from_march.div_euclid(DAYS_PER_ERA),
            from_march.rem_euclid(DAYS_PER_ERA),
        );
        let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * of_year + 2) / 153;
        let day = of_year - (153 * month_from_march + 2) / 5 + 1;
        let (month, carry) = if month_from_march < 10 {
            (month_from_march + 3, 0)
        } else {
            (month_from_march - 9, 1)
        };
        let year = (era * 400 + year_of_era + carry).rem_euclid(10_000);
        Self {
            year: u16::try_from(year).expect("a year has four digits"),
            month: small(month),
            day: small(day),
            hour: small(of_day / 3_600),
            minute: small(of_day / 60 % 60),
            second: small(of_day % 60),
        }
    }

    /// Seconds since 1970-01-01 00:00:00, or `None` for a date that the calendar does not have.
    pub(super) fn to_unix(self) -> Option<i64> {
        let (year, month, day) = (i64::from(self.year), i64::from(self.month), i64::from(self.day));
        let of_day = i64::from(self.hour) * 3_600 + i64::from(self.minute) * 60 + i64::from(self.second);
        let shifted = if month > 2 { year } else { year - 1 };
        let (era, year_of_era) = (shifted.div_euclid(400), shifted.rem_euclid(400));
        let month_from_march = (month + 9) % 12;
        let of_year = (153 * month_from_march + 2) / 5 + day - 1;
        let of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year;
        let seconds = (era * DAYS_PER_ERA + of_era - DAYS_TO_1970) * SECONDS_PER_DAY + of_day;
        // A date that is none comes back as another one.
        (Self::from_unix(seconds) == self).then_some(seconds)
    }
}

/// 1 for Sunday to 7 for Saturday, of the day that `seconds` after 1970-01-01 lies in.
pub(super) fn day_of_week(seconds: i64) -> u8 {
    const THURSDAY: i64 = 4;
    small((seconds.div_euclid(SECONDS_PER_DAY) + THURSDAY).rem_euclid(7)) + 1
}

/// How the registers write numbers: the Data Mode and 24/12 bits of register B.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Format {
    pub(super) binary: bool,
    pub(super) hours_24: bool,
}

/// Bit 7 of the hours register in the 12-hour mode.
const PM: u8 = 0x80;

impl Format {
    /// A number below 100 as a register shows it.
    pub(super) const fn encode(self, value: u8) -> u8 {
        if self.binary {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    /// The number a register shows, or `None` where it shows none below 100.
    pub(super) fn decode(self, register: u8) -> Option<u8> {
        let (tens, ones) = (register >> 4, register & 0xf);
        let value = match self.binary {
            true => register,
            false if tens < 10 && ones < 10 => tens * 10 + ones,
            false => return None,
        };
        (value < 100).then_some(value)
    }

    /// An hour from 0 to 23 as the hours register shows it.
    pub(super) const fn encode_hour(self, hour: u8) -> u8 {
        if self.hours_24 {
            return self.encode(hour);
        }
        let half = if hour >= 12 { PM } else { 0 };
        let of_half = match hour % 12 {
            0 => 12,
            past => past,
        };
        half | self.encode(of_half)
    }

    /// The hour from 0 to 23 that the hours register shows.
    pub(super) fn decode_hour(self, register: u8) -> Option<u8> {
        if self.hours_24 {
            return self.decode(register).filter(|hour| *hour < 24);
        }
        let of_half = self.decode(register & !PM)?;
        let half = if register & PM == 0 { 0 } else { 12 };
        (1..=12).contains(&of_half).then(|| of_half % 12 + half)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BCD_24: Format = Format {
        binary: false,
        hours_24: true,
    };

    fn date(year: u16, month: u8, day: u8) -> Date {
        Date {
            year,
            month,
            day,
            hour: 0,
            minute: 0,
            second: 0,
        }
    }

    #[test]
    fn known_moments_have_their_dates() {
        assert_eq!(Date::from_unix(0), date(1970, 1, 1));
        assert_eq!(Date::from_unix(951_782_400), date(2000, 2, 29));
        assert_eq!(Date::from_unix(4_107_542_400), date(2100, 3, 1));
        let late = Date::from_unix(1_795_365_599);
        assert_eq!((late.year, late.month, late.day), (2026, 11, 22));
        assert_eq!((late.hour, late.minute, late.second), (16, 39, 59));
    }

    #[test]
    fn days_of_the_week_go_round() {
        assert_eq!(day_of_week(0), 5);
        assert_eq!(day_of_week(2 * SECONDS_PER_DAY), 7);
        assert_eq!(day_of_week(3 * SECONDS_PER_DAY), 1);
        assert_eq!(day_of_week(-1), 4);
    }

    #[test]
    fn dates_that_the_calendar_lacks_are_none() {
        for missing in [
            date(2023, 2, 29),
            date(2100, 2, 29),
            date(2024, 4, 31),
            date(2024, 13, 1),
            date(2024, 0, 1),
            date(2024, 1, 0),
            date(2024, 1, 99),
            Date {
                hour: 24,
                ..date(2024, 1, 1)
            },
            Date {
                second: 60,
                ..date(2024, 1, 1)
            },
        ] {
            assert_eq!(missing.to_unix(), None, "{missing:?}");
        }
    }

    #[test]
    fn twelve_hours_have_a_noon_and_a_midnight() {
        let format = Format {
            binary: false,
            hours_24: false,
        };
        assert_eq!(
            [0, 1, 11, 12, 13, 23].map(|hour| format.encode_hour(hour)),
            [0x12, 0x01, 0x11, 0x92, 0x81, 0x91]
        );
        assert_eq!(format.decode_hour(0x00), None);
        assert_eq!(format.decode_hour(0x93), None);
    }

    #[test]
    fn digits_beyond_nine_are_no_number() {
        assert_eq!(BCD_24.decode(0x1a), None);
        assert_eq!(BCD_24.decode(0xa1), None);
        assert_eq!(BCD_24.decode(0x99), Some(99));
        assert_eq!(BCD_24.decode_hour(0x24), None);
    }

    proptest! {
        #[test]
        fn a_date_and_its_seconds_are_the_same_moment(seconds in -62_167_219_200_i64..253_402_300_800) {
            prop_assert_eq!(Date::from_unix(seconds).to_unix(), Some(seconds));
        }

        #[test]
        fn an_hour_survives_every_format(hour in 0_u8..24, binary: bool, hours_24: bool) {
            let format = Format { binary, hours_24 };
            prop_assert_eq!(format.decode_hour(format.encode_hour(hour)), Some(hour));
        }

        #[test]
        fn no_register_value_makes_a_date_that_panics(fields: [u8; 6], year in 0_u16..10_000) {
            let [month, day, hour, minute, second, _] = fields;
            let _ = Date { year, month, day, hour, minute, second }.to_unix();
        }
    }
}
