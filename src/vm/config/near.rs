//! "Did you mean": the nearest valid choice to something that is none.

/// How many choices a message lists before it only counts them.
const LISTED: usize = 24;

/// What to say after "`word` is not valid": the nearest of `choices`, and all of them when they are few.
#[must_use]
pub fn instead(word: &str, what: &str, choices: &[&str]) -> String {
    let mut text = match nearest(word, choices) {
        Some(near) => format!("did you mean `{near}`? "),
        None => String::new(),
    };
    match choices {
        [] => text.push_str(&format!("there are no {what}")),
        few if few.len() <= LISTED => text.push_str(&format!("{what} are {}", few.join(", "))),
        many => text.push_str(&format!("there are {} {what}", many.len())),
    }
    text
}

/// The choice that is fewest edits away, if few enough to be meant.
#[must_use]
pub fn nearest<'a>(word: &str, choices: &[&'a str]) -> Option<&'a str> {
    let allowed = 1 + word.chars().count() / 4;
    choices
        .iter()
        .map(|choice| (distance(word, choice, allowed), *choice))
        .filter(|(distance, _)| *distance <= allowed)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, choice)| choice)
}

/// Insertions, deletions, replacements and swaps of neighbours that make `b` of `a`; more than `limit` when
/// the lengths alone need more.
fn distance(a: &str, b: &str, limit: usize) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    if a.len().abs_diff(b.len()) > limit {
        return limit + 1;
    }
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let replaced = last[j] + usize::from(x != y);
            let mut best = replaced.min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *x == b[j - 1] && a[i - 1] == *y {
                best = best.min(before_last[j - 1] + 1);
            }
            row.push(best);
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_finger_is_recognized() {
        let keys = ["path", "readonly", "queues", "queue-size"];
        assert_eq!(nearest("pth", &keys), Some("path"));
        assert_eq!(nearest("redaonly", &keys), Some("readonly"));
        assert_eq!(nearest("queue_size", &keys), Some("queue-size"));
    }

    #[test]
    fn something_else_is_not_taken_for_a_slip() {
        assert_eq!(nearest("image", &["path", "readonly"]), None);
        assert_eq!(nearest("x", &["direct"]), None);
    }

    #[test]
    fn long_lists_are_counted_and_short_ones_shown() {
        let many: Vec<String> = (0..30).map(|at| format!("rp{at}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(instead("zzzzz", "ports", &many), "there are 30 ports");
        assert_eq!(
            instead("rp", "ports", &["rp0"]),
            "did you mean `rp0`? ports are rp0"
        );
        assert_eq!(instead("rp", "ports", &[]), "there are no ports");
    }
}
