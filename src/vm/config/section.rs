//! How a section is read: its keys are the fields of a struct, said once for flags, files, help and messages.

use super::near;
use super::said::{ConfigError, Kind, Place, Table, Value};

/// A section of the machine file, which is also a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SectionInfo {
    /// The name: `[name]`, `[[name]]` and `--name`.
    pub name: &'static str,
    /// What it is, as help says it.
    pub doc: &'static str,
    /// The key that a value alone is said for.
    pub main: Option<&'static str>,
    /// Whether it may be said several times.
    pub many: bool,
    /// Its keys.
    pub keys: &'static [KeyInfo],
}

/// A key of a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyInfo {
    /// The name.
    pub name: &'static str,
    /// What it means, as help says it.
    pub doc: &'static str,
}

impl SectionInfo {
    /// How the file writes its head.
    #[must_use]
    pub fn head(&self) -> String {
        if self.many {
            format!("[[{}]]", self.name)
        } else {
            format!("[{}]", self.name)
        }
    }
}

/// What was said for a section that has been read, kept for messages about what it means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    section: &'static str,
    place: Place,
    said: Table,
}

impl Source {
    /// A `section` that nobody said.
    #[must_use]
    pub fn unsaid(section: &'static str) -> Self {
        Self {
            section,
            place: Place::Default,
            said: Table::default(),
        }
    }

    /// Where `key` was said, or else its section.
    #[must_use]
    pub fn place_of(&self, key: &str) -> &Place {
        self.said.get(key).map_or(&self.place, |value| &value.place)
    }

    /// Whether anything was said for `key`.
    #[must_use]
    pub fn says(&self, key: &str) -> bool {
        self.said.get(key).is_some()
    }

    /// `key` is wrong: an error that says where and with which value.
    pub fn wrong(&self, key: &str, problem: impl Into<String>) -> ConfigError {
        ConfigError {
            place: self.place_of(key).clone(),
            key: Some(format!("{}.{key}", self.section)),
            value: self.said.get(key).map(|value| text(&value.kind)),
            problem: problem.into(),
        }
    }

    /// The section is wrong as a whole.
    pub fn wrong_altogether(&self, problem: impl Into<String>) -> ConfigError {
        let mut error = ConfigError::at(&self.place, problem);
        error.key = Some(self.section.to_owned());
        error
    }
}

/// A section that can be read.
pub trait Section: Sized {
    /// Its name and its keys.
    const INFO: SectionInfo;

    /// Read it; unknown keys and values that are none are refused.
    fn read(value: &Value) -> Result<Self, ConfigError>;

    /// What was said.
    fn source(&self) -> &Source;
}

/// What one text can mean.
pub trait Word: Sized {
    /// Read it; the error says what is wrong with it and what would be right.
    fn read(text: &str) -> Result<Self, String>;
}

/// A key that must be said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Required<T>(pub T);

/// What a key holds: something optional, required, or a list.
pub(super) trait Field: Sized {
    /// Read what was said for the key, if anything was.
    fn read(said: Option<&Value>) -> Result<Self, String>;
}

fn word<T: Word>(value: &Value) -> Result<T, String> {
    match &value.kind {
        Kind::Text(text) => T::read(text),
        Kind::List(_) => Err("one value is meant here, not a list".to_owned()),
        Kind::Table(_) => Err("one value is meant here, not a table".to_owned()),
    }
}

impl<T: Word> Field for Option<T> {
    fn read(said: Option<&Value>) -> Result<Self, String> {
        said.map(word).transpose()
    }
}

impl<T: Word> Field for Required<T> {
    fn read(said: Option<&Value>) -> Result<Self, String> {
        let said = said.ok_or("must be given")?;
        word(said).map(Self)
    }
}

/// One text is a list of one.
impl<T: Word> Field for Vec<T> {
    fn read(said: Option<&Value>) -> Result<Self, String> {
        match said.map(|value| (&value.kind, value)) {
            None => Ok(Self::new()),
            Some((Kind::List(values), _)) => values.iter().map(word).collect(),
            Some((_, value)) => word(value).map(|one| vec![one]),
        }
    }
}

/// The keys of one section while they are read.
pub(super) struct Keys<'a> {
    info: &'static SectionInfo,
    place: &'a Place,
    said: Table,
}

impl<'a> Keys<'a> {
    /// The keys said in `value`, all of them known to the section.
    pub(super) fn open(info: &'static SectionInfo, value: &'a Value) -> Result<Self, ConfigError> {
        let said = match (&value.kind, info.main) {
            (Kind::Table(table), _) => table.clone(),
            (Kind::Text(_), Some(main)) => {
                let mut table = Table::default();
                table.set(main, value.clone());
                table
            }
            (Kind::Text(_) | Kind::List(_), _) => {
                let problem = format!("this is a table; write {} and its keys below", info.head());
                let mut error = ConfigError::at(&value.place, problem);
                error.key = Some(info.name.to_owned());
                return Err(error);
            }
        };
        let names: Vec<&str> = info.keys.iter().map(|key| key.name).collect();
        if let Some((key, value)) = said.iter().find(|(key, _)| !names.contains(key)) {
            return Err(ConfigError {
                place: value.place.clone(),
                key: Some(format!("{}.{key}", info.name)),
                value: None,
                problem: format!("unknown key; {}", near::instead(key, "keys", &names)),
            });
        }
        Ok(Self {
            info,
            place: &value.place,
            said,
        })
    }

    /// What was said for `key`.
    pub(super) fn field<T: Field>(&self, key: &str) -> Result<T, ConfigError> {
        let said = self.said.get(key);
        T::read(said).map_err(|problem| ConfigError {
            place: said.map_or(self.place, |value| &value.place).clone(),
            key: Some(format!("{}.{key}", self.info.name)),
            value: said.map(|value| text(&value.kind)),
            problem,
        })
    }

    pub(super) fn into_source(self) -> Source {
        Source {
            section: self.info.name,
            place: self.place.clone(),
            said: self.said,
        }
    }
}

/// A value as a message shows it, shortened when it is long.
fn text(kind: &Kind) -> String {
    match kind {
        Kind::Text(text) if text.is_empty() => "\"\"".to_owned(),
        Kind::Text(text) if text.chars().count() > 60 => text.chars().take(57).chain("...".chars()).collect(),
        Kind::Text(text) => text.clone(),
        Kind::List(values) => {
            let texts: Vec<String> = values.iter().map(|value| self::text(&value.kind)).collect();
            format!("[{}]", texts.join(","))
        }
        Kind::Table(_) => "a table".to_owned(),
    }
}

/// Define a section: the struct, its names, and how it is read.
macro_rules! section {
    (
        $(#[doc = $about:literal])+
        pub struct $Section:ident is $many:ident $name:literal $(, main $main:literal)? {
            $(
                $(#[doc = $doc:literal])+
                $field:ident = $key:literal: $Type:ty,
            )+
        }
    ) => {
        $(#[doc = $about])+
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $Section {
            source: $crate::vm::config::section::Source,
            $(
                $(#[doc = $doc])+
                pub $field: $Type,
            )+
        }

        impl $crate::vm::config::section::Section for $Section {
            const INFO: $crate::vm::config::section::SectionInfo = $crate::vm::config::section::SectionInfo {
                name: $name,
                doc: concat!($($about),+),
                main: section!(@main $($main)?),
                many: section!(@many $many),
                keys: &[$($crate::vm::config::section::KeyInfo { name: $key, doc: concat!($($doc),+) }),+],
            };

            fn read(value: &$crate::vm::config::said::Value) -> Result<Self, $crate::vm::config::said::ConfigError> {
                let keys = $crate::vm::config::section::Keys::open(&Self::INFO, value)?;
                Ok(Self {
                    $($field: keys.field($key)?,)+
                    source: keys.into_source(),
                })
            }

            fn source(&self) -> &$crate::vm::config::section::Source {
                &self.source
            }
        }
    };
    (@main) => { None };
    (@main $main:literal) => { Some($main) };
    (@many one) => { false };
    (@many several) => { true };
}
pub(super) use section;
