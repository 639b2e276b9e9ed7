//! Control flow: `while` and `if`.

use super::{Body, Element, Type, Value, join};

impl Body {
    /// Repeats `step` on the values as long as `condition` holds. Everything that both need is carried: a loop
    /// sees only its own arguments.
    pub fn while_loop(
        &mut self,
        init: &[Value],
        condition: impl FnOnce(&mut Self, &[Value]) -> Value,
        step: impl FnOnce(&mut Self, &[Value]) -> Vec<Value>,
    ) -> Vec<Value> {
        let id = self.fresh();
        let types: Vec<Type> = init.iter().map(|v| v.ty.clone()).collect();
        let n = init.len();
        self.line(format_args!(
            "%{id}:{n} = \"stablehlo.while\"({}) ({{",
            join(init)
        ));
        self.region(&types, &[Type::new(Element::I1, &[])], |b, args| {
            vec![condition(b, args)]
        });
        self.line(format_args!("}}, {{"));
        self.region(&types, &types, step);
        let types_text = join(&types);
        self.line(format_args!("}}) : ({types_text}) -> ({types_text})"));
        types
            .into_iter()
            .enumerate()
            .map(|(i, ty)| Value {
                name: format!("{id}#{i}"),
                ty,
            })
            .collect()
    }

    /// Computes one branch only. Branches may use values from outside.
    pub fn if_else(
        &mut self,
        pred: &Value,
        ty: &Type,
        yes: impl FnOnce(&mut Self) -> Value,
        no: impl FnOnce(&mut Self) -> Value,
    ) -> Value {
        if pred.ty != Type::new(Element::I1, &[]) {
            self.refuse("if", format!("{} is no condition", pred.ty));
        }
        let value = Value {
            name: self.fresh().to_string(),
            ty: ty.clone(),
        };
        self.line(format_args!("{value} = \"stablehlo.if\"({pred}) ({{"));
        self.region(&[], std::slice::from_ref(ty), |b, _| vec![yes(b)]);
        self.line(format_args!("}}, {{"));
        self.region(&[], std::slice::from_ref(ty), |b, _| vec![no(b)]);
        self.line(format_args!("}}) : (tensor<i1>) -> {ty}"));
        value
    }

    fn region(
        &mut self,
        args: &[Type],
        results: &[Type],
        write: impl FnOnce(&mut Self, &[Value]) -> Vec<Value>,
    ) {
        let args: Vec<Value> = args
            .iter()
            .map(|ty| Value {
                name: self.fresh().to_string(),
                ty: ty.clone(),
            })
            .collect();
        if !args.is_empty() {
            let header = join(args.iter().map(|a| format!("{a}: {}", a.ty)));
            self.line(format_args!("^bb0({header}):"));
        }
        self.depth += 1;
        let out = write(self, &args);
        let types: Vec<Type> = out.iter().map(|v| v.ty.clone()).collect();
        if types != results {
            self.refuse(
                "region",
                format!("returns ({}), not ({})", join(&types), join(results)),
            );
        }
        self.line(format_args!(
            "stablehlo.return {} : {}",
            join(&out),
            join(&types)
        ));
        self.depth -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hlo::{Module, Order};

    #[test]
    fn a_loop_that_returns_other_types_is_refused() {
        let mut m = Module::new("w");
        let i = m.arg(Type::new(Element::I32, &[]), None);
        let b = m.body();
        let out = b.while_loop(
            &[i],
            |b, a| b.compare(Order::Lt, &a[0], &a[0]),
            |b, a| vec![b.convert(&a[0], Element::F32)],
        );
        assert_eq!(m.finish(&out).unwrap_err().op, "region");
    }
}
