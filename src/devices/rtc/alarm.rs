//! When the alarm goes off: at every second whose fields match the three alarm registers.

use super::date::{Date, Format};

/// What one alarm register asks of its field.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Field {
    /// "Don't care": the two top bits are set.
    Any,
    Only(u8),
    /// A value that the field never has.
    Never,
}

impl Field {
    fn of(register: u8, decode: impl FnOnce(u8) -> Option<u8>, below: u8) -> Self {
        if register >= 0xc0 {
            return Self::Any;
        }
        decode(register)
            .filter(|value| *value < below)
            .map_or(Self::Never, Self::Only)
    }

    fn matches(self, value: u8) -> bool {
        match self {
            Self::Any => true,
            Self::Only(only) => only == value,
            Self::Never => false,
        }
    }
}

/// The three alarm registers, decoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct AlarmTime {
    second: Field,
    minute: Field,
    hour: Field,
}

impl AlarmTime {
    pub(super) fn new(second: u8, minute: u8, hour: u8, format: Format) -> Self {
        let plain = |register| format.decode(register);
        Self {
            second: Field::of(second, plain, 60),
            minute: Field::of(minute, plain, 60),
            hour: Field::of(hour, |register| format.decode_hour(register), 24),
        }
    }

    /// The first second after `after` (both since 1970) at which the alarm goes off; `None` for never.
    ///
    /// Skips hours and minutes that do not match as a whole, so that it ends after at most 24 + 60 + 60 steps
    /// and a few.
    pub(super) fn next(self, after: i64) -> Option<i64> {
        const DAY: i64 = 86_400;
        let mut at = after + 1;
        while at <= after + DAY {
            let date = Date::from_unix(at);
            let (minute, second) = (i64::from(date.minute), i64::from(date.second));
            if !self.hour.matches(date.hour) {
                at += 3_600 - minute * 60 - second;
            } else if !self.minute.matches(date.minute) {
                at += 60 - second;
            } else if !self.second.matches(date.second) {
                at += 1;
            } else {
                return Some(at);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: Format = Format {
        binary: true,
        hours_24: true,
    };
    const ANY: u8 = 0xff;

    fn next(second: u8, minute: u8, hour: u8, after: i64) -> Option<i64> {
        AlarmTime::new(second, minute, hour, FORMAT).next(after)
    }

    #[test]
    fn an_exact_time_comes_once_a_day() {
        let at = 3 * 3_600 + 4 * 60 + 5;
        assert_eq!(next(5, 4, 3, 0), Some(at));
        assert_eq!(next(5, 4, 3, at - 1), Some(at));
        assert_eq!(next(5, 4, 3, at), Some(at + 86_400));
    }

    #[test]
    fn fields_that_do_not_care_match_every_hour_minute_or_second() {
        assert_eq!(next(ANY, ANY, ANY, 1_000), Some(1_001));
        assert_eq!(next(30, ANY, ANY, 1_000), Some(1_050));
        assert_eq!(next(0, 0, ANY, 1_000), Some(3_600));
        assert_eq!(next(0xc0, 5, ANY, 310), Some(311));
    }

    #[test]
    fn values_that_no_field_has_never_come() {
        assert_eq!(next(60, ANY, ANY, 0), None);
        assert_eq!(next(ANY, 99, ANY, 0), None);
        assert_eq!(next(ANY, ANY, 24, 0), None);
        let bcd = Format {
            binary: false,
            hours_24: true,
        };
        assert_eq!(AlarmTime::new(0x1f, ANY, ANY, bcd).next(0), None);
    }

    #[test]
    fn an_alarm_agrees_with_trying_every_second() {
        for (second, minute, hour) in [(59, 59, 23), (0, 0, 0), (ANY, 7, 13), (1, ANY, 23), (0, 30, ANY)] {
            let alarm = AlarmTime::new(second, minute, hour, FORMAT);
            let matches = |at: &i64| {
                let date = Date::from_unix(*at);
                alarm.hour.matches(date.hour)
                    && alarm.minute.matches(date.minute)
                    && alarm.second.matches(date.second)
            };
            let after = 951_782_399;
            assert_eq!(alarm.next(after), (after + 1..).find(matches));
        }
    }
}
