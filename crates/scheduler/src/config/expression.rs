//! Expressions over the usage of a response: the part of CEL that counts tokens.
//!
//! Numbers, `true` and `false`, fields of `usage`, `has(…)`, `int(…)`, `double(…)`, arithmetic, comparisons, `!`, `&&`,
//! `||`, `? :` and parentheses. All numbers are doubles, as they are in llm-d's reporter, but whole ones may stand beside
//! them. What is wrong when it is computed, such as a field that is not there, gives no value.

use serde_json::Value;

/// Deepest nesting, and longest text.
const MAX_DEPTH: usize = 64;
const MAX_TEXT: usize = 4096;

/// An expression that was understood.
#[derive(Clone, Debug, PartialEq)]
pub struct Expression(Node);

#[derive(Clone, Debug, PartialEq)]
enum Node {
    Is(Worth),
    Field(Path),
    Has(Path),
    Not(Box<Node>),
    Negative(Box<Node>),
    Whole(Box<Node>),
    Both(Box<[Node; 2]>),
    Either(Box<[Node; 2]>),
    If(Box<[Node; 3]>),
    Pair(Op, Box<[Node; 2]>),
}

/// Names below `usage`.
type Path = Box<[Box<str>]>;

/// A value.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Worth {
    Number(f64),
    Flag(bool),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Add,
    Subtract,
    Multiply,
    Divide,
    Rest,
    Equal,
    Unequal,
    Less,
    AtMost,
    Greater,
    AtLeast,
}

/// Operators by how tightly they bind, loosest first; `<=` before `<`, which it begins with.
const LEVELS: [&[(&str, Op)]; 3] = [
    &[
        ("==", Op::Equal),
        ("!=", Op::Unequal),
        ("<=", Op::AtMost),
        (">=", Op::AtLeast),
        ("<", Op::Less),
        (">", Op::Greater),
    ],
    &[("+", Op::Add), ("-", Op::Subtract)],
    &[("*", Op::Multiply), ("/", Op::Divide), ("%", Op::Rest)],
];

impl Expression {
    /// Reads `text`.
    ///
    /// # Errors
    /// What is not understood, from there on.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.len() > MAX_TEXT {
            return Err("this is too long".to_owned());
        }
        let mut rest = Rest { text, depth: 0 };
        let node = rest.choice();
        rest.blank();
        match node {
            Some(node) if rest.text.is_empty() => Ok(Self(node)),
            _ => {
                let from: String = rest.text.chars().take(20).collect();
                Err(format!("this is not understood from {from:?} on"))
            }
        }
    }

    /// Its number for this `usage`; nothing, if it has none.
    #[must_use]
    pub fn number(&self, usage: &Value) -> Option<f64> {
        number(&self.0, usage).filter(|n| n.is_finite())
    }

    /// Whether it is true for this `usage`; nothing, if it is neither.
    #[must_use]
    pub fn flag(&self, usage: &Value) -> Option<bool> {
        flag(&self.0, usage)
    }
}

/// What is not read yet.
struct Rest<'a> {
    text: &'a str,
    depth: usize,
}

impl<'a> Rest<'a> {
    /// Passes over what means nothing.
    fn blank(&mut self) {
        loop {
            self.text = self.text.trim_start();
            let Some(comment) = self.text.strip_prefix("//") else {
                return;
            };
            self.text = comment.split_once('\n').map_or("", |(_, rest)| rest);
        }
    }

    fn take(&mut self, token: &str) -> bool {
        self.blank();
        let rest = self.text.strip_prefix(token);
        self.text = rest.unwrap_or(self.text);
        rest.is_some()
    }

    fn choice(&mut self) -> Option<Node> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        let condition = self.either()?;
        let node = if self.take("?") {
            let yes = self.choice()?;
            let no = self.take(":").then(|| self.choice())??;
            Node::If(Box::new([condition, yes, no]))
        } else {
            condition
        };
        self.depth -= 1;
        Some(node)
    }

    fn either(&mut self) -> Option<Node> {
        let mut left = self.both()?;
        while self.take("||") {
            left = Node::Either(Box::new([left, self.both()?]));
        }
        Some(left)
    }

    fn both(&mut self) -> Option<Node> {
        let mut left = self.level(0)?;
        while self.take("&&") {
            left = Node::Both(Box::new([left, self.level(0)?]));
        }
        Some(left)
    }

    /// Operators of this level and of those that bind more tightly.
    fn level(&mut self, level: usize) -> Option<Node> {
        let Some(ops) = LEVELS.get(level) else {
            return self.sign();
        };
        let mut left = self.level(level + 1)?;
        while let Some((_, op)) = ops.iter().find(|(token, _)| self.take(token)) {
            left = Node::Pair(*op, Box::new([left, self.level(level + 1)?]));
        }
        Some(left)
    }

    fn sign(&mut self) -> Option<Node> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        let node = if self.take("!") {
            Node::Not(Box::new(self.sign()?))
        } else if self.take("-") {
            Node::Negative(Box::new(self.sign()?))
        } else {
            self.operand()?
        };
        self.depth -= 1;
        Some(node)
    }

    fn operand(&mut self) -> Option<Node> {
        if self.take("(") {
            let inner = self.choice()?;
            return self.take(")").then_some(inner);
        }
        if self.text.starts_with(|c: char| c.is_ascii_digit()) {
            return self.literal();
        }
        match self.name()? {
            "true" => Some(Node::Is(Worth::Flag(true))),
            "false" => Some(Node::Is(Worth::Flag(false))),
            "usage" => self.path().map(Node::Field),
            "has" => {
                let usage = self.take("(") && self.name()? == "usage";
                let path = usage.then(|| self.path())??;
                self.take(")").then_some(Node::Has(path))
            }
            "int" => self.argument().map(|inner| Node::Whole(Box::new(inner))),
            "double" => self.argument(),
            _ => None,
        }
    }

    fn argument(&mut self) -> Option<Node> {
        let inner = self.take("(").then(|| self.choice())??;
        self.take(")").then_some(inner)
    }

    fn literal(&mut self) -> Option<Node> {
        let part = |c: char| c.is_ascii_digit() || c == '.';
        let end = self.text.find(|c| !part(c)).unwrap_or(self.text.len());
        let (digits, rest) = self.text.split_at(end);
        let number = digits.parse().ok()?;
        self.text = rest;
        Some(Node::Is(Worth::Number(number)))
    }

    fn name(&mut self) -> Option<&'a str> {
        self.blank();
        let part = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let end = self.text.find(|c| !part(c)).unwrap_or(self.text.len());
        let (name, rest) = self.text.split_at(end);
        self.text = rest;
        let begins = name.starts_with(|c: char| !c.is_ascii_digit());
        begins.then_some(name)
    }

    /// `.name`, at least once.
    fn path(&mut self) -> Option<Path> {
        let mut path = Vec::new();
        while self.take(".") {
            path.push(self.name()?.into());
        }
        (!path.is_empty()).then(|| path.into())
    }
}

fn find<'a>(path: &Path, usage: &'a Value) -> Option<&'a Value> {
    let found = path
        .iter()
        .try_fold(usage, |value, name| value.get(&**name));
    found.filter(|value| !value.is_null())
}

fn worth(node: &Node, usage: &Value) -> Option<Worth> {
    use Worth::{Flag, Number};
    match node {
        Node::Is(worth) => Some(*worth),
        Node::Field(path) => match find(path, usage)? {
            Value::Bool(flag) => Some(Flag(*flag)),
            value => value.as_f64().map(Number),
        },
        Node::Has(path) => Some(Flag(find(path, usage).is_some())),
        Node::Not(inner) => flag(inner, usage).map(|flag| Flag(!flag)),
        Node::Negative(inner) => number(inner, usage).map(|n| Number(-n)),
        Node::Whole(inner) => number(inner, usage).map(|n| Number(n.trunc())),
        // Either side may decide alone, whatever is wrong with the other.
        Node::Both(sides) => match sides.each_ref().map(|side| flag(side, usage)) {
            [Some(false), _] | [_, Some(false)] => Some(Flag(false)),
            [left, right] => Some(Flag(left? && right?)),
        },
        Node::Either(sides) => match sides.each_ref().map(|side| flag(side, usage)) {
            [Some(true), _] | [_, Some(true)] => Some(Flag(true)),
            [left, right] => Some(Flag(left? || right?)),
        },
        Node::If(parts) => {
            let [condition, yes, no] = &**parts;
            worth(if flag(condition, usage)? { yes } else { no }, usage)
        }
        Node::Pair(op, sides) => {
            let [left, right] = sides.each_ref().map(|side| worth(side, usage));
            apply(*op, left?, right?)
        }
    }
}

fn number(node: &Node, usage: &Value) -> Option<f64> {
    match worth(node, usage)? {
        Worth::Number(number) => Some(number),
        Worth::Flag(_) => None,
    }
}

fn flag(node: &Node, usage: &Value) -> Option<bool> {
    match worth(node, usage)? {
        Worth::Flag(flag) => Some(flag),
        Worth::Number(_) => None,
    }
}

fn apply(op: Op, left: Worth, right: Worth) -> Option<Worth> {
    use Worth::{Flag, Number};
    let (Number(a), Number(b)) = (left, right) else {
        return match op {
            Op::Equal => Some(Flag(left == right)),
            Op::Unequal => Some(Flag(left != right)),
            _ => None,
        };
    };
    Some(match op {
        Op::Add => Number(a + b),
        Op::Subtract => Number(a - b),
        Op::Multiply => Number(a * b),
        Op::Divide => Number(a / b),
        Op::Rest => Number(a % b),
        Op::Equal => Flag(left == right),
        Op::Unequal => Flag(left != right),
        Op::Less => Flag(a < b),
        Op::AtMost => Flag(a <= b),
        Op::Greater => Flag(a > b),
        Op::AtLeast => Flag(a >= b),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn usage() -> Value {
        json!({"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}, "none": null})
    }

    #[test]
    fn numbers_of_a_response_are_put_together() {
        for (text, value) in [
            ("usage.prompt_tokens + usage.completion_tokens", Some(10.0)),
            (
                "(has(usage.prompt_tokens) ? usage.prompt_tokens : 0) + (has(usage.none) ? usage.none : 0)",
                Some(7.0),
            ),
            (
                "usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens * 2",
                Some(-1.0),
            ),
            ("10 - 2 - 3 // from the left\n", Some(5.0)),
            ("int(usage.prompt_tokens / 2.0) % 2", Some(1.0)),
            ("-usage.prompt_tokens + double(1)", Some(-6.0)),
            ("usage.missing + 1", None),
            ("1 / 0", None),
            ("true + 1", None),
            ("usage.prompt_tokens > 5", None),
        ] {
            let expression = Expression::parse(text).unwrap();
            assert_eq!(expression.number(&usage()), value, "{text}");
        }
    }

    #[test]
    fn conditions_are_true_or_false_or_neither() {
        for (text, value) in [
            (
                "has(usage.prompt_tokens) && has(usage.completion_tokens)",
                Some(true),
            ),
            ("has(usage.none) || usage.prompt_tokens >= 7", Some(true)),
            ("!(1 < 2) == false", Some(true)),
            ("usage.missing > 1 && 1 > 2", Some(false)),
            ("usage.missing > 1 || 1 < 2", Some(true)),
            ("usage.missing > 1 && 1 < 2", None),
            ("1 < 2 ? 3 != 4 : usage.missing > 1", Some(true)),
            ("usage.prompt_tokens", None),
        ] {
            let expression = Expression::parse(text).unwrap();
            assert_eq!(expression.flag(&usage()), value, "{text}");
        }
    }

    #[test]
    fn what_is_not_understood_is_shown() {
        for (text, from) in [
            ("", ""),
            ("usage", ""),
            ("usage.a +", ""),
            ("usage.a b", "b"),
            ("size(usage.a)", "(usage.a)"),
            ("1.2.3", "1.2.3"),
            ("(1", ""),
        ] {
            let error = Expression::parse(text).unwrap_err();
            assert_eq!(error, format!("this is not understood from {from:?} on"));
        }
        for deep in ["(".repeat(4000), "!".repeat(4000), "1".repeat(5000)] {
            assert!(Expression::parse(&deep).is_err());
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in "(usage\\.a|has\\(usage\\.b\\)|[0-9]{1,3}|[-+*/%!?:()<>=&|. ]){0,24}") {
            if let Ok(expression) = Expression::parse(&text) {
                let _ = (expression.number(&usage()), expression.flag(&usage()));
            }
        }
    }
}
