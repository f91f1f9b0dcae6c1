//! Steps on the CPU at a chosen level. [`super::step`] chooses the best one.

use super::cpu_block::{Task, run};
use super::hyper::noise_key;
use super::rules::{at_unit_rate, trust};
use super::{BLOCK, Common, Extra, Parameter, Rule, State, check};
use crate::device::cpu::{Level, for_each_task, share};
use crate::error::Result;

/// Elements below which a second thread does not pay.
const GRAIN: usize = 1 << 14;

/// Elements of a piece of work, whole blocks: small enough that threads end together.
const PIECE: usize = 1 << 16;
const _: () = assert!(PIECE.is_multiple_of(BLOCK));

/// [`super::step`] at a level.
pub fn step(level: Level, rule: Rule, parameters: &mut [Parameter<'_>], common: &Common) -> Result<()> {
    level.check()?;
    parameters.iter().try_for_each(|parameter| check(rule, parameter))?;
    let mut factors = vec![1.0; parameters.len()];
    if rule.has_trust() {
        // Sums of pieces, added in the order of pieces, so that the number of threads changes nothing.
        let mut sums: Vec<_> = parameters.iter().map(|p| vec![(0.0, 0.0); p.p.len().div_ceil(PIECE)]).collect();
        let mut tasks = Vec::new();
        for (parameter, sums) in parameters.iter_mut().zip(&mut sums) {
            let pieces = pieces(parameter, common, 1.0).into_iter().zip(sums);
            tasks.extend(pieces.map(|(task, sum)| Task { sums: Some(sum), ..task }));
        }
        in_batches(level, rule, tasks, common);
        for ((factor, parameter), sums) in factors.iter_mut().zip(parameters.iter_mut()).zip(sums) {
            let (p, u) = sums.into_iter().fold((0.0, 0.0), |(p, u), (a, b)| (p + a, u + b));
            *factor = trust(p, u, &parameter.scalars);
            if let Some(to) = &mut parameter.update_squares {
                **to = at_unit_rate(u, &parameter.scalars);
            }
        }
    }
    let pairs = parameters.iter_mut().zip(factors);
    in_batches(level, rule, pairs.flat_map(|(parameter, factor)| pieces(parameter, common, factor)).collect(), common);
    Ok(())
}

/// Shares `tasks` among threads, about as many elements to each.
fn in_batches(level: Level, rule: Rule, tasks: Vec<Task<'_>>, common: &Common) {
    let each = share(tasks.iter().map(|task| task.g.len()).sum(), GRAIN);
    let (mut batches, mut filled) = (vec![Vec::new()], 0);
    for task in tasks {
        if filled >= each {
            batches.push(Vec::new());
            filled = 0;
        }
        filled += task.g.len();
        batches.last_mut().expect("there is one").push(task);
    }
    for_each_task(batches, |batch| batch.into_iter().for_each(|task| run(level, rule, task, common)));
}

/// A parameter in pieces.
fn pieces<'a>(parameter: &'a mut Parameter<'_>, common: &Common, factor: f32) -> Vec<Task<'a>> {
    let k = parameter.scalars;
    let key = common.seed.map(|seed| noise_key(seed, k.step, parameter.index));
    let mut rest = Task {
        p: parameter.p.reborrow(),
        g: parameter.g,
        states: parameter.states.iter_mut().map(reborrow).collect(),
        extra: match &mut parameter.extra {
            Extra::None => Extra::None,
            Extra::Master(master) => Extra::Master(master),
            Extra::Compensation(lost) => Extra::Compensation(lost.reborrow()),
        },
        scalars: k,
        key,
        first: 0,
        factor,
        sums: None,
    };
    let mut pieces = Vec::new();
    while rest.g.len() > PIECE {
        let (piece, after) = rest.split(PIECE);
        pieces.push(piece);
        rest = after;
    }
    if !rest.g.is_empty() {
        pieces.push(rest);
    }
    pieces
}

fn reborrow<'a>(state: &'a mut State<'_>) -> State<'a> {
    match state {
        State::Full(values) => State::Full(values),
        State::Eight { codes, absmax } => State::Eight { codes, absmax },
    }
}
