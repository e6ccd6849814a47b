//! `key=value,key=value`: what a flag says about one section.
//!
//! The first part may be a value alone, which is then said for the section's main key: `--disk a.img` is
//! `--disk path=a.img`. A value with commas in it stands in double quotes (`path="a,b.img"`) or, as a list, in
//! brackets (`pin=[0-1,2-3]`).

use std::sync::Arc;

use super::said::{ConfigError, Kind, Place, Table, Value};

/// Read what `--name text` says. Without a `main` key every part needs a key of its own.
pub(super) fn parse(name: &str, text: &str, main: Option<&str>) -> Result<Value, ConfigError> {
    let place = Place::Flag(Arc::from(format!("--{name} {text}")));
    let refused = |problem: String| ConfigError::at(&place, problem);
    let mut table = Table::default();
    for (at, part) in split(text).map_err(&refused)?.into_iter().enumerate() {
        let (key, value) = match (key_of(part), main) {
            (Some((key, value)), _) => (key, value),
            (None, Some(main)) if at == 0 && !part.is_empty() => (main, part),
            (None, _) if part.is_empty() => {
                return Err(refused(
                    "a part between commas is empty; write key=value".to_owned(),
                ));
            }
            (None, _) => {
                return Err(refused(format!("`{part}` says no value; write {part}=VALUE")));
            }
        };
        if table.get(key).is_some() {
            return Err(refused(format!("`{key}` is said twice")));
        }
        table.set(key, self::value(value, &place).map_err(refused)?);
    }
    Ok(Value {
        place,
        kind: Kind::Table(table),
    })
}

/// What `--name text` says when it is one text, whatever is in it.
pub(super) fn verbatim(name: &str, text: &str) -> Value {
    Value {
        place: Place::Flag(Arc::from(format!("--{name} {text:?}"))),
        kind: Kind::Text(text.to_owned()),
    }
}

/// The key and the value of `key=value`; keys are lower-case words with hyphens.
fn key_of(part: &str) -> Option<(&str, &str)> {
    let (key, value) = part.split_once('=')?;
    let word = !key.is_empty()
        && key
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    word.then_some((key, value))
}

/// At the commas that are neither quoted nor in brackets.
fn split(text: &str) -> Result<Vec<&str>, String> {
    let (mut parts, mut start) = (Vec::new(), 0);
    let (mut quoted, mut bracketed) = (false, false);
    for (at, c) in text.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '[' if !quoted => bracketed = true,
            ']' if !quoted => bracketed = false,
            ',' if !quoted && !bracketed => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if quoted {
        return Err("a quotation mark is not closed".to_owned());
    }
    if bracketed {
        return Err("a bracket is not closed".to_owned());
    }
    parts.push(&text[start..]);
    Ok(parts)
}

/// A text, or a list of texts in brackets.
fn value(text: &str, place: &Place) -> Result<Value, String> {
    let said = |kind| Value {
        place: place.clone(),
        kind,
    };
    let plain = |text: &str| {
        let quoted = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
        said(Kind::Text(quoted.unwrap_or(text).to_owned()))
    };
    let list = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    Ok(match list {
        Some("") => said(Kind::List(Vec::new())),
        Some(list) => said(Kind::List(split(list)?.into_iter().map(plain).collect())),
        None => plain(text),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Vec<(String, Kind)> {
        let value = parse("disk", text, Some("path")).expect("well formed");
        let Kind::Table(table) = value.kind else {
            panic!("a flag says a table");
        };
        table
            .iter()
            .map(|(key, value)| (key.to_owned(), value.kind.clone()))
            .collect()
    }

    fn pair(key: &str, text: &str) -> (String, Kind) {
        (key.to_owned(), Kind::Text(text.to_owned()))
    }

    fn refused(text: &str) -> String {
        parse("disk", text, Some("path")).expect_err(text).to_string()
    }

    #[test]
    fn the_first_part_may_be_the_main_value() {
        assert_eq!(
            said("a.img,readonly=on"),
            [pair("path", "a.img"), pair("readonly", "on")]
        );
        assert_eq!(said("path=a.img"), [pair("path", "a.img")]);
        assert_eq!(said("./x=y/a.img"), [pair("path", "./x=y/a.img")]);
    }

    #[test]
    fn quotes_and_brackets_keep_commas() {
        assert_eq!(said("path=\"a,b.img\""), [pair("path", "a,b.img")]);
        let wanted = ["0-1", "2"].map(|text| Kind::Text(text.to_owned()));
        let [(_, Kind::List(list))] = &said("fd=[0-1,2]")[..] else {
            panic!("brackets make a list");
        };
        let kinds: Vec<_> = list.iter().map(|value| value.kind.clone()).collect();
        assert_eq!(kinds, wanted);
    }

    #[test]
    fn what_is_not_well_formed_is_refused_with_the_flag() {
        assert_eq!(
            refused("a.img,readonly"),
            "--disk a.img,readonly: `readonly` says no value; write readonly=VALUE"
        );
        assert_eq!(
            refused("a.img,"),
            "--disk a.img,: a part between commas is empty; write key=value"
        );
        assert_eq!(refused("id=a,id=b"), "--disk id=a,id=b: `id` is said twice");
        assert!(refused("path=\"a").ends_with("a quotation mark is not closed"));
        assert!(refused("fd=[1,2").ends_with("a bracket is not closed"));
    }
}
