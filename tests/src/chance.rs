//! Chance that can be had again: from a seed, which is printed.

/// Names the seed.
pub const SEED_VARIABLE: &str = "SEAWALL_SEED";

/// Numbers that a seed decides.
#[derive(Clone, Debug)]
pub struct Chance(u64);

impl Chance {
    /// From the seed in the environment; without one, from the clock. Says which, so that a failure can be had again.
    pub fn from_environment() -> Chance {
        let given = std::env::var(SEED_VARIABLE).ok().and_then(|text| text.parse().ok());
        let seed = given.unwrap_or_else(|| block::UnixNanos::now().0 / 1000 % 1_000_000);
        println!("{SEED_VARIABLE}={seed}");
        Chance::new(seed)
    }

    /// From this seed.
    pub fn new(seed: u64) -> Chance {
        // Small seeds begin far apart from each other.
        Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `end`, which is at least 1.
    pub fn below(&mut self, end: u64) -> u64 {
        // xorshift64 (Marsaglia, 2003).
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % end
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.below(u64::MAX) ^ self.0.rotate_left(29)
    }

    /// One of these.
    pub fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_decides_and_all_come() {
        let numbers =
            |seed| (0..50).scan(Chance::new(seed), |chance, _| Some(chance.below(5))).collect::<Vec<_>>();
        assert_eq!(numbers(3), numbers(3));
        assert_ne!(numbers(3), numbers(4));
        assert!((0..5).all(|wanted| numbers(0).contains(&wanted)));
    }
}
