//! What an operator says of models and priorities: `InferenceObjective` and `InferenceModelRewrite`, as plain data.

use std::collections::BTreeMap;

/// All of it at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Objects {
    /// Priorities by the name of the objective; unset is 0.
    pub objectives: BTreeMap<Box<str>, i32>,
    /// Rules that give models other names, best first: the oldest object's before a younger one's.
    pub rewrites: Vec<Rewrite>,
}

/// One rule of a rewrite object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// The object's name.
    pub object: Box<str>,
    /// Models that it is for; empty for every one.
    pub models: Vec<Box<str>>,
    /// What they may become.
    pub targets: Vec<Target>,
}

/// A name that a model may get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The name.
    pub model: Box<str>,
    /// Its share among the rule's targets, if it is said.
    pub weight: Option<u32>,
}

impl Objects {
    /// The priority of requests for `objective`; 0 if there is none of that name.
    #[must_use]
    pub fn priority(&self, objective: Option<&str>) -> i32 {
        objective
            .and_then(|name| self.objectives.get(name))
            .copied()
            .unwrap_or(0)
    }

    /// The name that `model` gets, and the object that says so. A rule that names the model goes before one for every
    /// model. `chance` draws among several targets.
    #[must_use]
    pub fn rewrite(&self, model: Option<&str>, chance: u64) -> Option<(&Rewrite, &str)> {
        let exact =
            |r: &&Rewrite| model.is_some_and(|model| r.models.iter().any(|m| **m == *model));
        let generic = |r: &&Rewrite| r.models.is_empty();
        let rules = &self.rewrites;
        let rule = (rules.iter().find(exact)).or_else(|| rules.iter().find(generic))?;
        Some((rule, rule.draw(chance)?))
    }
}

impl Rewrite {
    /// Targets without a weight are never drawn beside others that have one; if none has, all are alike.
    fn draw(&self, chance: u64) -> Option<&str> {
        let sum: u64 = self.targets.iter().map(Target::share).sum();
        if sum == 0 {
            let n = self.targets.len() as u64;
            let at = chance.checked_rem(n)?;
            return self
                .targets
                .get(usize::try_from(at).ok()?)
                .map(|t| &*t.model);
        }
        let mut left = chance % sum;
        self.targets.iter().find_map(|target| {
            let share = target.share();
            let here = left < share;
            left = left.saturating_sub(share);
            here.then_some(&*target.model)
        })
    }
}

impl Target {
    fn share(&self) -> u64 {
        self.weight.unwrap_or(0).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(models: &[&str], targets: &[(&str, Option<u32>)]) -> Rewrite {
        Rewrite {
            object: "o".into(),
            models: models.iter().map(|&m| m.into()).collect(),
            targets: targets
                .iter()
                .map(|&(model, weight)| Target {
                    model: model.into(),
                    weight,
                })
                .collect(),
        }
    }

    fn drawn(rewrites: Vec<Rewrite>, model: Option<&str>) -> Vec<String> {
        let objects = Objects {
            rewrites,
            ..Objects::default()
        };
        (0..4)
            .filter_map(|chance| Some(objects.rewrite(model, chance)?.1.to_owned()))
            .collect()
    }

    #[test]
    fn an_exact_rule_goes_before_a_generic_one_and_an_older_one_before_a_younger() {
        let rules = vec![
            rule(&[], &[("generic", None)]),
            rule(&["m"], &[("old", None)]),
            rule(&["m"], &[("young", None)]),
        ];
        assert_eq!(drawn(rules.clone(), Some("m"))[0], "old");
        assert_eq!(drawn(rules.clone(), Some("n"))[0], "generic");
        assert_eq!(drawn(rules, None)[0], "generic");
        assert!(drawn(vec![rule(&["m"], &[("x", None)])], Some("n")).is_empty());
    }

    #[test]
    fn targets_are_drawn_by_weight_and_those_without_never_beside_others() {
        let weighted = rule(&["m"], &[("a", Some(3)), ("b", None), ("c", Some(1))]);
        assert_eq!(drawn(vec![weighted], Some("m")), ["a", "a", "a", "c"]);
        let alike = rule(&["m"], &[("a", None), ("b", None)]);
        assert_eq!(drawn(vec![alike], Some("m")), ["a", "b", "a", "b"]);
        assert!(drawn(vec![rule(&["m"], &[])], Some("m")).is_empty());
    }

    #[test]
    fn a_priority_that_nobody_set_is_zero() {
        let objectives = BTreeMap::from([("low".into(), -1)]);
        let objects = Objects {
            objectives,
            ..Objects::default()
        };
        assert_eq!(objects.priority(Some("low")), -1);
        assert_eq!(
            (objects.priority(Some("x")), objects.priority(None)),
            (0, 0)
        );
    }
}
