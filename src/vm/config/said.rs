//! What was said and where: one tree for the machine file and for flags, before it has a meaning.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where something was said, for messages and for paths relative to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A line of a machine file, counted from 1.
    File {
        /// The file, as it was named.
        path: Arc<Path>,
        /// The line.
        line: usize,
    },
    /// A flag with its value, as it was written.
    Flag(Arc<str>),
    /// Nowhere: a default.
    Default,
}

impl Place {
    /// `path` as whoever said it meant it: relative to the machine file it stands in.
    #[must_use]
    pub fn resolve(&self, path: &Path) -> PathBuf {
        match self {
            Self::File { path: file, .. } => file.parent().unwrap_or(Path::new("")).join(path),
            Self::Flag(_) | Self::Default => path.to_owned(),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Flag(text) => f.write_str(text),
            Self::Default => f.write_str("the default machine"),
        }
    }
}

/// Something that was said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value {
    /// Where.
    pub place: Place,
    /// What.
    pub kind: Kind,
}

/// What was said. Numbers and truth values are text until somebody knows what they mean, so that a flag and a
/// file say the same thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// One word, number or sentence.
    Text(String),
    /// Several.
    List(Vec<Value>),
    /// Keys and their values.
    Table(Table),
}

/// Keys and their values, in the order they were said. A key occurs once.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Table(Vec<(String, Value)>);

impl Table {
    /// What was said for `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value)
    }

    /// Every key with its value.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Say `value` for `key`, whatever was said before.
    pub fn set(&mut self, key: &str, value: Value) {
        match self.0.iter_mut().find(|(name, _)| name == key) {
            Some((_, old)) => *old = value,
            None => self.0.push((key.to_owned(), value)),
        }
    }

    /// Say everything that `over` says, whatever was said before.
    pub fn override_with(&mut self, over: Self) {
        for (key, value) in over.0 {
            self.set(&key, value);
        }
    }
}

/// Of keys that are all different.
impl FromIterator<(String, Value)> for Table {
    fn from_iter<I: IntoIterator<Item = (String, Value)>>(said: I) -> Self {
        Self(said.into_iter().collect())
    }
}

/// A configuration that cannot be followed: where, which key, and what would be valid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// Where it was said.
    pub place: Place,
    /// Which key, with its section.
    pub key: Option<String>,
    /// What was said for it.
    pub value: Option<String>,
    /// What is wrong, and what would be right.
    pub problem: String,
}

impl ConfigError {
    /// Something wrong at `place` that is not about one key.
    pub fn at(place: &Place, problem: impl Into<String>) -> Self {
        Self {
            place: place.clone(),
            key: None,
            value: None,
            problem: problem.into(),
        }
    }
}

/// `PLACE: KEY = VALUE: PROBLEM`.
impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.place)?;
        if let Some(key) = &self.key {
            write!(f, "{key}")?;
            if let Some(value) = &self.value {
                write!(f, " = {value}")?;
            }
            f.write_str(": ")?;
        }
        f.write_str(&self.problem)
    }
}

impl std::error::Error for ConfigError {}
