//! Writes every target's seeds to `fuzz/seeds/`: again after a format has changed.

use kvoyant_fuzz::{CANARY, TARGETS, seeds_folder};

fn main() -> std::io::Result<()> {
    for target in TARGETS.iter().chain([&CANARY]) {
        let folder = seeds_folder(target.name);
        std::fs::create_dir_all(&folder)?;
        let seeds = (target.seeds)();
        for (number, seed) in seeds.iter().enumerate() {
            std::fs::write(folder.join(format!("{number:02}")), seed)?;
        }
        println!("{}: {} seeds", target.name, seeds.len());
    }
    Ok(())
}
