//! An error and its causes as lines for a person.

use std::io::{self, Write};

/// Print `error` and what it is because of, each once, to standard error.
pub(crate) fn print(error: &anyhow::Error) {
    // Nobody is left to tell when standard error is gone.
    let _ = io::stderr().write_all(text(error).as_bytes());
}

fn text(error: &anyhow::Error) -> String {
    let mut text = format!("error: {error}\n");
    let mut last = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        // A message that only passes its cause on says nothing new.
        if cause != last {
            text.push_str(&format!("  because {cause}\n"));
        }
        last = cause;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_has_a_line_of_its_own() {
        let error = anyhow::anyhow!("No such file")
            .context("cannot open /dev/kvm")
            .context("cannot run");
        assert_eq!(
            text(&error),
            "error: cannot run\n  because cannot open /dev/kvm\n  because No such file\n"
        );
    }

    #[test]
    fn a_message_that_is_passed_on_is_printed_once() {
        let error = anyhow::anyhow!("the reason").context("the reason");
        assert_eq!(text(&error), "error: the reason\n");
    }
}
