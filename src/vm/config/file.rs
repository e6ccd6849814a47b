//! The machine file: TOML, with the line of everything in it.

use std::path::Path;
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::said::{ConfigError, Kind, Place, Table, Value};

/// Read the text of a machine file. `path` is what messages call it.
pub(super) fn parse(path: &Path, text: &str) -> Result<Table, ConfigError> {
    let file = File {
        path: Arc::from(path),
        lines: line_starts(text),
    };
    let table = DeTable::parse(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        ConfigError::at(&file.place(at), format!("not TOML: {}", error.message()))
    })?;
    file.table(table.get_ref())
}

struct File {
    path: Arc<Path>,
    /// The byte at which each line begins.
    lines: Vec<usize>,
}

fn line_starts(text: &str) -> Vec<usize> {
    let after_breaks = text.match_indices('\n').map(|(at, _)| at + 1);
    std::iter::once(0).chain(after_breaks).collect()
}

impl File {
    fn place(&self, at: usize) -> Place {
        Place::File {
            path: self.path.clone(),
            line: self.lines.partition_point(|start| *start <= at),
        }
    }

    /// TOML refuses a key that is said twice, so that none of these is.
    fn table(&self, table: &DeTable<'_>) -> Result<Table, ConfigError> {
        let said = table.iter().map(|(key, value)| {
            let mut value = self.value(key.get_ref(), value)?;
            // What is said for a key is said where the key is, also when its value spans lines.
            value.place = self.place(key.span().start);
            Ok((key.get_ref().to_string(), value))
        });
        said.collect()
    }

    fn value(&self, key: &str, value: &Spanned<DeValue<'_>>) -> Result<Value, ConfigError> {
        let place = self.place(value.span().start);
        let kind = match value.get_ref() {
            DeValue::String(text) => Kind::Text(text.to_string()),
            DeValue::Integer(number) => Kind::Text(number.to_string()),
            DeValue::Boolean(truth) => Kind::Text(if *truth { "on" } else { "off" }.to_owned()),
            DeValue::Array(values) => {
                let values = values.iter().map(|value| self.value(key, value));
                Kind::List(values.collect::<Result<_, _>>()?)
            }
            DeValue::Table(table) => Kind::Table(self.table(table)?),
            DeValue::Float(_) | DeValue::Datetime(_) => {
                return Err(ConfigError {
                    place,
                    key: Some(key.to_owned()),
                    value: None,
                    problem: "neither fractions nor dates mean anything here; write text or a whole number"
                        .to_owned(),
                });
            }
        };
        Ok(Value { place, kind })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Table {
        parse(Path::new("m.toml"), text).expect("TOML")
    }

    fn text_of<'a>(table: &'a Table, key: &str) -> &'a Kind {
        &table.get(key).expect("it was said").kind
    }

    #[test]
    fn scalars_become_the_text_a_flag_would_have() {
        let table = said("a = 0x40\nb = true\nc = \"x y\"\nd = 1_000\n");
        let kinds = ["a", "b", "c", "d"].map(|key| text_of(&table, key).clone());
        let wanted = ["0x40", "on", "x y", "1000"].map(|text| Kind::Text(text.to_owned()));
        assert_eq!(kinds, wanted);
    }

    #[test]
    fn every_key_knows_its_line() {
        let table = said("a = 1\n\n[[disk]]\npath = \"x\"\n[[disk]]\n\npath = \"y\"\n");
        let Kind::List(disks) = text_of(&table, "disk") else {
            panic!("an array of tables is a list");
        };
        let Kind::Table(second) = &disks[1].kind else {
            panic!("of tables");
        };
        let places = [&disks[1].place, &second.get("path").expect("said").place];
        assert_eq!(places.map(ToString::to_string), ["m.toml:5", "m.toml:7"]);
    }

    #[test]
    fn what_is_not_toml_is_refused_with_its_line() {
        let error = parse(Path::new("m.toml"), "a = 1\nb = = 2\n").expect_err("not TOML");
        assert!(error.to_string().starts_with("m.toml:2: not TOML: "), "{error}");
        let twice = parse(Path::new("m.toml"), "a = 1\na = 2\n").expect_err("said twice");
        assert!(twice.to_string().starts_with("m.toml:2: not TOML: "), "{twice}");
    }

    #[test]
    fn fractions_are_refused_with_the_key() {
        let error = parse(Path::new("m.toml"), "memory = 1.5\n").expect_err("a fraction");
        assert!(error.to_string().starts_with("m.toml:1: memory: "), "{error}");
    }

    #[test]
    fn paths_in_a_file_start_at_the_file() {
        let place = Place::File {
            path: Arc::from(Path::new("configs/m.toml")),
            line: 1,
        };
        assert_eq!(
            place.resolve(Path::new("disk.img")),
            Path::new("configs/disk.img")
        );
        assert_eq!(place.resolve(Path::new("/disk.img")), Path::new("/disk.img"));
    }
}
