//! One item of each class, of least value within a limit: the multiple-choice knapsack.
//!
//! Classes are taken one after the other. Of the choices so far only those are kept that no other beats in both value and
//! weight, and that could still end below the best complete choice known: the linear relaxation of the classes that follow
//! bounds from below what they add. It is solved for every remainder at once, since it is convex in what it may weigh: the steps
//! of all classes, the steepest first (Pisinger, *A minimal algorithm for the multiple-choice knapsack problem*, 1995).

/// Most choices that are kept. Two hundred classes of six items need far fewer.
const MOST: usize = 1 << 17;

/// How far two sums of the same numbers may lie apart, relatively.
const ROUNDING: f64 = 1e-12;

/// An item: what choosing it costs, and what it takes of the limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Item {
    /// To be made least; at least 0.
    pub value: f64,
    /// To be kept within the limit; at least 0.
    pub weight: f64,
}

/// A choice.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The item of each class.
    pub items: Vec<usize>,
    /// Their values, summed.
    pub value: f64,
    /// Their weights, summed.
    pub weight: f64,
    /// No choice within the limit has less value than this: it is `value`, but where there were too many choices to keep.
    pub bound: f64,
}

/// The choice of least value within the limit. `None` where even the lightest items weigh more.
///
/// # Panics
/// If a class has no items.
#[must_use]
pub fn choose(classes: &[Vec<Item>], limit: f64) -> Option<Choice> {
    choose_among(classes, limit, MOST)
}

/// As [`choose`], with at most so many choices kept.
fn choose_among(classes: &[Vec<Item>], limit: f64, most: usize) -> Option<Choice> {
    let limit = limit * (1.0 + ROUNDING);
    let kept: Vec<Vec<usize>> = classes.iter().map(|class| undominated(class)).collect();
    let hulls: Vec<Vec<usize>> = classes.iter().zip(&kept).map(|(class, kept)| hull(class, kept)).collect();
    let rest = Relaxation::of_suffixes(classes, &hulls);
    if rest[0].weight > limit {
        return None;
    }
    let mut best = (f64::INFINITY, Vec::new());
    let mut dropped = f64::INFINITY;
    let mut steps: Vec<Vec<State>> = vec![vec![State { value: 0.0, weight: 0.0, before: 0, item: 0 }]];
    for (at, class) in classes.iter().enumerate() {
        let behind = &rest[at + 1];
        let bound = |state: &State| state.value + behind.least(limit - state.weight);
        let mut next: Vec<State> = Vec::new();
        for (before, state) in steps[at].iter().enumerate() {
            let add = |&item: &usize| {
                let Item { value, weight } = class[item];
                State { value: state.value + value, weight: state.weight + weight, before, item }
            };
            let fits =
                |state: &State| state.weight + behind.weight <= limit && bound(state) < best.0 * (1.0 + ROUNDING);
            next.extend(kept[at].iter().map(add).filter(fits));
        }
        next.sort_by(|a, b| a.weight.total_cmp(&b.weight).then(a.value.total_cmp(&b.value)));
        let mut least = f64::INFINITY;
        next.retain(|state| {
            let better = state.value < least;
            least = least.min(state.value);
            better
        });
        steps.push(next);
        for number in 0..steps[at + 1].len() {
            let state = steps[at + 1][number];
            let value = state.value + behind.whole(limit - state.weight);
            if value < best.0 {
                best = (value, complete(&steps, at + 1, number, behind.choice(limit - state.weight)));
            }
        }
        let next = &mut steps[at + 1];
        next.retain(|state| bound(state) < best.0 * (1.0 + ROUNDING));
        if next.len() > most {
            let mut bounds: Vec<f64> = next.iter().map(bound).collect();
            bounds.sort_by(f64::total_cmp);
            dropped = dropped.min(bounds[most]);
            next.retain(|state| bound(state) < bounds[most]);
        }
    }
    let items = best.1;
    let sum = |part: fn(&Item) -> f64| items.iter().zip(classes).map(|(&item, class)| part(&class[item])).sum::<f64>();
    let (value, weight) = (sum(|item| item.value), sum(|item| item.weight));
    Some(Choice { bound: value.min(dropped), items, value, weight })
}

/// The least that one item of each class weighs together.
#[must_use]
pub fn lightest(classes: &[Vec<Item>]) -> f64 {
    classes.iter().map(|class| class.iter().map(|item| item.weight).fold(f64::INFINITY, f64::min)).sum()
}

/// A choice for the first few classes.
#[derive(Clone, Copy)]
struct State {
    value: f64,
    weight: f64,
    /// Its place among the choices for one class fewer.
    before: usize,
    item: usize,
}

/// The items of a choice, with those of the classes behind it.
fn complete(steps: &[Vec<State>], mut at: usize, mut number: usize, behind: Vec<usize>) -> Vec<usize> {
    let mut items: Vec<usize> = behind.into_iter().rev().collect();
    while at > 0 {
        let state = &steps[at][number];
        items.push(state.item);
        (at, number) = (at - 1, state.before);
    }
    items.reverse();
    items
}

/// The items that no other beats, the lightest first; of equal ones the first.
fn undominated(class: &[Item]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..class.len()).collect();
    order.sort_by(|&a, &b| {
        let (a, b) = (class[a], class[b]);
        a.weight.total_cmp(&b.weight).then(a.value.total_cmp(&b.value))
    });
    let mut least = f64::INFINITY;
    order.retain(|&item| {
        let better = class[item].value < least;
        least = least.min(class[item].value);
        better
    });
    order
}

/// Of these, the corners of the convex hull: each step is less steep than the one before it.
fn hull(class: &[Item], kept: &[usize]) -> Vec<usize> {
    let mut corners: Vec<usize> = Vec::new();
    for &item in kept {
        while let [.., first, second] = corners[..] {
            if slope(class[first], class[second]) < slope(class[second], class[item]) {
                break;
            }
            corners.pop();
        }
        corners.push(item);
    }
    corners
}

/// What a step changes the value by, for each unit of weight; negative.
fn slope(from: Item, to: Item) -> f64 {
    (to.value - from.value) / (to.weight - from.weight)
}

/// The linear relaxation of some classes: from their lightest items up the steps of their hulls, the steepest first.
struct Relaxation {
    /// Of the lightest items.
    weight: f64,
    /// Weight and value after so many steps.
    sums: Vec<(f64, f64)>,
    /// The class of each step, and the item that it leads to.
    steps: Vec<(usize, usize)>,
    /// The lightest items.
    first: Vec<usize>,
}

impl Relaxation {
    /// That of the classes from each one on, and that of none.
    fn of_suffixes(classes: &[Vec<Item>], hulls: &[Vec<usize>]) -> Vec<Self> {
        let mut order: Vec<(f64, usize, usize)> = Vec::new();
        for (at, (class, hull)) in classes.iter().zip(hulls).enumerate() {
            order.extend(hull.windows(2).map(|pair| (slope(class[pair[0]], class[pair[1]]), at, pair[1])));
        }
        // Steps of one class keep their order, as they become less steep.
        order.sort_by(|a, b| a.0.total_cmp(&b.0));
        let suffix = |from: usize| {
            let first: Vec<usize> = hulls[from..].iter().map(|hull| hull[0]).collect();
            let mut at: Vec<usize> = first.clone();
            let sum = |part: fn(&Item) -> f64| -> f64 {
                first.iter().zip(&classes[from..]).map(|(&item, class)| part(&class[item])).sum()
            };
            let (mut weight, mut value) = (sum(|item| item.weight), sum(|item| item.value));
            let mut sums = vec![(weight, value)];
            let mut steps = Vec::new();
            for &(_, class, item) in order.iter().filter(|step| step.1 >= from) {
                let (old, new) = (classes[class][at[class - from]], classes[class][item]);
                (weight, value) = (weight + new.weight - old.weight, value + new.value - old.value);
                at[class - from] = item;
                sums.push((weight, value));
                steps.push((class - from, item));
            }
            Self { weight: sums[0].0, sums, steps, first }
        };
        (0..=classes.len()).map(suffix).collect()
    }

    /// How many steps fit whole.
    fn fitting(&self, room: f64) -> usize {
        self.sums.partition_point(|&(weight, _)| weight <= room).saturating_sub(1)
    }

    /// A value that nothing within this room is below.
    fn least(&self, room: f64) -> f64 {
        let whole = self.fitting(room);
        let (weight, value) = self.sums[whole];
        match self.sums.get(whole + 1) {
            Some(&(next, below)) if next > weight => {
                value + (below - value) * ((room - weight) / (next - weight)).max(0.0)
            }
            _ => value,
        }
    }

    /// The value of the steps that fit whole.
    fn whole(&self, room: f64) -> f64 {
        self.sums[self.fitting(room)].1
    }

    /// The items that these steps lead to.
    fn choice(&self, room: f64) -> Vec<usize> {
        let mut items = self.first.clone();
        for &(class, item) in &self.steps[..self.fitting(room)] {
            items[class] = item;
        }
        items
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "these are the same sums")]
mod tests {
    use super::{Item, choose, choose_among, lightest};

    /// Numbers from 0 to 1 that look random.
    struct Noise(u64);

    impl Noise {
        fn next(&mut self) -> f64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 11) as f64 / (1u64 << 53) as f64
        }
    }

    /// As weights of layers are: each bit less costs four times the noise, more or less.
    fn layers(noise: &mut Noise, classes: usize, formats: usize) -> Vec<Vec<Item>> {
        let layer = |noise: &mut Noise| {
            let (size, cost) = ((1.0 + noise.next() * 40.0).floor() * 64.0, (noise.next() * 8.0 - 4.0).exp());
            let item = |format: usize| {
                let bits = [2.0, 3.0, 4.0, 6.0, 8.0, 16.0][format];
                Item { value: cost * 4f64.powf(-bits) * noise.next().exp(), weight: size * bits }
            };
            (0..formats).map(item).collect()
        };
        (0..classes).map(|_| layer(noise)).collect()
    }

    /// Tries every choice.
    fn brute(classes: &[Vec<Item>], limit: f64) -> Option<f64> {
        let all: usize = classes.iter().map(Vec::len).product();
        let sums = (0..all).map(|mut number| {
            classes.iter().fold((0.0, 0.0), |(value, weight), class| {
                let item = class[number % class.len()];
                number /= class.len();
                (value + item.value, weight + item.weight)
            })
        });
        sums.filter(|sum| sum.1 <= limit).map(|sum| sum.0).min_by(f64::total_cmp)
    }

    #[test]
    fn finds_what_trying_everything_finds() {
        let mut noise = Noise(1);
        for case in 0..200 {
            let classes = layers(&mut noise, 1 + case % 6, 1 + case % 5);
            let heaviest: f64 =
                classes.iter().map(|class| class.iter().map(|item| item.weight).fold(0.0, f64::max)).sum();
            let least = lightest(&classes);
            for part in [-0.01, 0.0, 0.1, 0.35, 0.5, 0.8, 1.0] {
                let limit = least + (heaviest - least) * part - if part < 0.0 { 1.0 } else { 0.0 };
                let (found, expected) = (choose(&classes, limit), brute(&classes, limit));
                assert_eq!(found.is_some(), expected.is_some(), "case {case}, {part}");
                let Some((found, expected)) = found.zip(expected) else { continue };
                assert!(
                    (found.value - expected).abs() <= 1e-12 * expected,
                    "case {case}, {part}: {found:?}, {expected}"
                );
                assert!(found.weight <= limit * (1.0 + 1e-12) && found.bound == found.value);
                // Least weight below a limit of the value is the same problem, turned.
                let turned: Vec<Vec<Item>> = classes
                    .iter()
                    .map(|class| class.iter().map(|item| Item { value: item.weight, weight: item.value }).collect())
                    .collect();
                let back = choose(&turned, found.value).expect("it is within the limit");
                assert!(back.value <= found.weight && Some(back.value) == brute(&turned, found.value * (1.0 + 1e-12)));
            }
        }
    }

    #[test]
    fn two_hundred_classes_of_six_items_are_exact() {
        let mut noise = Noise(2);
        for part in [0.05, 0.2, 0.5] {
            let classes = layers(&mut noise, 200, 6);
            let least = lightest(&classes);
            let found = choose(&classes, least * (1.0 + part * 7.0)).expect("feasible");
            assert!(found.bound == found.value, "{part}: {} above {}", found.value, found.bound);
            // Fewer choices kept give a bound that holds, and a choice that is not far from it.
            let rough = choose_among(&classes, least * (1.0 + part * 7.0), 4).expect("feasible");
            assert!(rough.bound <= found.value * (1.0 + 1e-12) && rough.value <= found.value * 1.05);
        }
    }

    #[test]
    fn equal_classes_do_not_multiply() {
        let class = vec![
            Item { value: 1.0, weight: 4.0 },
            Item { value: 0.25, weight: 8.0 },
            Item { value: 0.0, weight: 32.0 },
        ];
        let classes = vec![class; 150];
        let found = choose(&classes, 150.0 * 6.0).expect("feasible");
        assert!((found.value - 93.75).abs() < 1e-9, "{}", found.value);
    }
}
