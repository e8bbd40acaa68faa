/* The panel's live line of sizes and cost, and its tooltips. No server call: the formulas are those of
   accdiff_lib/plan.py, schedule.py, cost.py, webui/outline.py and webui/hires.py; tests/test_webui_javascript.py compares
   them. Without a browser (node) the file exports them. */
(function () {
    "use strict";

    // --- numbers as Python has them ----------------------------------------------------------------------------

    const CELL = 8, LARGEST = 16384, EPS = 1e-6;

    /** Python's round: halves go to the even number. */
    function round(x) {
        const low = Math.floor(x);
        if (x - low !== 0.5) return Math.round(x);
        return low % 2 === 0 ? low : low + 1;
    }

    function mod(a, b) { return ((a % b) + b) % b; }

    function linspace(from, to, count) {
        return Array.from({length: count}, (_, i) => count === 1 ? from : from + i * (to - from) / (count - 1));
    }

    function interpolate(x, xs, ys) {
        if (x <= xs[0]) return ys[0];
        if (x >= xs[xs.length - 1]) return ys[ys.length - 1];
        let low = 0, high = xs.length - 1;
        while (high - low > 1) {
            const middle = (low + high) >> 1;
            if (xs[middle] <= x) low = middle; else high = middle;
        }
        return ys[low] + (x - xs[low]) * (ys[high] - ys[low]) / (xs[high] - xs[low]);
    }

    // --- plan.py -----------------------------------------------------------------------------------------------

    function windowStarts(size, window, stride) {
        return size <= window ? 1 : Math.trunc((size - window) / stride - EPS) + 2;
    }

    function scales(target, progressive, doubling) {
        if (target <= 1 + EPS) return [];
        if (progressive && doubling) {
            const steps = Math.max(1, round(Math.log2(target)));
            return Array.from({length: steps}, (_, k) => target ** ((k + 1) / steps));
        }
        const count = progressive ? Math.max(1, Math.floor(target - 0.5 + EPS)) : 1;
        return Array.from({length: count}, (_, k) => 1 + (target - 1) * (k + 1) / count);
    }

    function coherentSize(base, native) {
        const area = base[0] * base[1];
        if (area <= 1.5 * native ** 2) return base;
        const factor = native / Math.sqrt(area);
        return base.map(side => Math.max(8, round(side * factor / 8) * 8));
    }

    function fit(window, size, multiple) {
        return Math.min(window, Math.ceil(size / multiple) * multiple);
    }

    /** The stages from a base picture of `base` = [height, width] pixels; an Error says why there is none. */
    function makePlan(base, settings, native, multiple) {
        for (const [name, side] of [["height", base[0]], ["width", base[1]]]) {
            if (side % CELL || side < 8 * CELL) throw new Error(`${name} ${side} is no multiple of 8 from 64`);
        }
        const target = settings.target_width ? [settings.target_height, settings.target_width]
            : base.map(side => round(side * settings.scale / CELL) * CELL);
        const ratios = [0, 1].map(i => target[i] / base[i]), largest = Math.max(...ratios);
        if (largest < 1 - EPS || largest > 8 + EPS || Math.min(...target) < 8 * CELL) {
            throw new Error(`${target[1]}x${target[0]} is ${Number(largest.toPrecision(3))} times ${base[1]}x${base[0]}; ` +
                "1 to 8 times is possible");
        }
        if (Math.max(...target) > LARGEST) throw new Error(`a side takes at most ${LARGEST} pixels`);
        const cells = base.map(side => side / CELL), wanted = target.map(side => side / CELL);
        const factor = Math.max(wanted[0] / cells[0], wanted[1] / cells[1]);
        const crop = [0, 1].map(i => Math.min(cells[i], Math.max(1, round(wanted[i] / factor))));
        const window = settings.window || native;
        const stride = Math.min(settings.stride || Math.max(1, round(window * (1 - settings.overlap))), window);
        const coherent = coherentSize(crop, native);
        const stages = scales(largest, settings.progressive, settings.doubling).map((scale, index) => {
            const last = Math.abs(scale - largest) < EPS;
            const size = last ? wanted : crop.map(side => round(side * scale));
            const dilation = Math.max(1, ...size.map((side, i) => Math.ceil(side / coherent[i] - 0.1)));
            const windows = size.map(side => fit(window, side, multiple));
            return {
                number: index + 1, scale: scale, size: size, window: windows, dilation: dilation, views: dilation ** 2,
                viewSize: size.map(side => (side + mod(-side, dilation * multiple)) / dilation),
                windowCount: windowStarts(size[0], windows[0], stride) * windowStarts(size[1], windows[1], stride),
            };
        });
        const result = stages.length ? stages[stages.length - 1].size : crop;
        return {base: cells, crop: crop, stages: stages, pixels: result.map(side => side * CELL)};
    }

    // --- webui/outline.py --------------------------------------------------------------------------------------

    const SIGMAS = [];
    let bar = 1;
    for (const root of linspace(Math.sqrt(0.00085), Math.sqrt(0.012), 1000)) {
        bar *= 1 - root ** 2;
        SIGMAS.push(Math.sqrt((1 - bar) / bar));
    }
    const LOG_SIGMAS = SIGMAS.map(Math.log), TIMESTEPS = SIGMAS.map((_, i) => i);
    const CONTROLNET_COST = 0.4;
    const AUTOMATIC = {
        "dpm++ 2m": "karras", "dpm++ sde": "karras", "dpm++ 2s a": "karras", "dpm2": "karras", "dpm2 a": "karras",
        "restart": "karras", "dpm++ 2m sde": "exponential", "dpm++ 2m sde heun": "exponential",
        "dpm++ 3m sde": "exponential",
    };

    function timestep(sigma) {
        if (sigma <= SIGMAS[0]) return 0;
        const found = interpolate(Math.log(sigma), LOG_SIGMAS, TIMESTEPS);
        return Math.abs(found - round(found)) < 1e-3 ? round(found) : found;
    }

    function sigmaAt(t) { return Math.exp(interpolate(t, TIMESTEPS, LOG_SIGMAS)); }

    function noiseLevels(scheduler, sampler, steps) {
        let name = scheduler.toLowerCase(), levels;
        const low = SIGMAS[0], high = SIGMAS[999];
        if (name === "automatic") name = AUTOMATIC[sampler.toLowerCase()] || "normal";
        if (name === "karras") {
            levels = linspace(high ** (1 / 7), low ** (1 / 7), steps).map(x => x ** 7);
        } else if (name === "exponential" || name === "polyexponential") {
            levels = linspace(Math.log(high), Math.log(low), steps).map(Math.exp);
        } else if (name === "sgm uniform") {
            levels = linspace(999, 0, steps + 1).slice(0, -1).map(sigmaAt);
        } else if (name === "leading") {
            const spacing = Math.floor(1000 / steps), offset = Math.min(1, 999 - (steps - 1) * spacing);
            levels = Array.from({length: steps}, (_, i) => SIGMAS[(steps - 1 - i) * spacing + offset]);
        } else if (name === "simple") {
            levels = Array.from({length: steps}, (_, i) => SIGMAS[999 - Math.trunc(i * 1000 / steps)]);
        } else {
            levels = linspace(999, 0, steps).map(sigmaAt);
        }
        return [...levels, 0].map(Math.fround);
    }

    function ancestral(sigma, following) {
        const up = Math.min(following, Math.sqrt(following ** 2 * (sigma ** 2 - following ** 2) / sigma ** 2));
        return Math.sqrt(following ** 2 - up ** 2);
    }

    /** Where the samplers with two calls a step make the second one. */
    const TRIALS = {
        "heun": (sigma, following) => following,
        "restart": (sigma, following) => following,
        "dpm2": (sigma, following) => Math.sqrt(sigma * following),
        "dpm++ sde": (sigma, following) => Math.sqrt(sigma * following),
        "dpm2 a": (sigma, following) => Math.sqrt(sigma * ancestral(sigma, following)),
        "dpm++ 2s a": (sigma, following) => Math.sqrt(sigma * ancestral(sigma, following)),
    };

    function rehearse(sampler, sigmas) {
        const trial = TRIALS[sampler.toLowerCase()], calls = [];
        for (let step = 0; step < sigmas.length - 1; step++) {
            calls.push({step: step, sigma: sigmas[step]});
            if (trial && sigmas[step + 1] > 0) {
                calls.push({step: step, sigma: Math.fround(trial(sigmas[step], sigmas[step + 1]))});
            }
        }
        return calls;
    }

    // --- schedule.py -------------------------------------------------------------------------------------------

    function weights(t, settings) {
        const k = 0.5 * (1 + Math.cos(Math.PI * (1000 - t) / 1000));
        const c1 = settings.skip_residual ? k ** settings.cosine_scale_1 : 0;
        const both = settings.windows && settings.dilated;
        return [c1, both ? k ** settings.cosine_scale_2 : Number(settings.dilated)];
    }

    function carried(c1) {
        const remains = [1];
        for (let i = c1.length - 1; i >= 0; i--) remains.push(remains[remains.length - 1] * (1 - c1[i]));
        return remains.reverse();
    }

    function inRange(step, count, start, end) { return step / count >= start && (step + 1) / count <= end; }

    function makeScript(sampler, sigmas, settings, hasControl, views, stages, fromNoise) {
        const count = sigmas.length - 1, tolerance = settings.tolerance / stages;
        const c1 = sigmas.slice(0, -1).map(sigma => weights(timestep(sigma), settings)[0]);
        const remains = carried(c1);
        const erased = Math.max(0, remains.slice(0, -1).filter(x => x <= tolerance / 3).length - 1);
        const start = fromNoise ? 0 : Math.min(Math.max(round(settings.start * count), erased), count - 1);
        const calls = rehearse(sampler, sigmas.slice(start));
        const negligible = settings.windows && settings.dilated && views > 1;
        let effect = 0;
        for (const call of calls) {
            const step = call.step + start, c2 = weights(timestep(call.sigma), settings)[1];
            call.local = settings.windows;
            call.dilated = settings.dilated && (!settings.windows || inRange(step, count, 0, settings.dilated_end));
            call.control = hasControl && settings.controlnet && settings.windows && settings.control_strength > 0 &&
                inRange(step, count, settings.control_start, settings.control_end);
            call.guided = inRange(step, count, settings.guidance_start, settings.guidance_end);
            if (negligible) {
                effect += (1 - sigmas[step + 1] / sigmas[step]) * (1 - c2) * remains[step + 1];
                call.local = !call.dilated || effect > tolerance / 10;
                call.control = call.control && call.local;
                call.dilated = call.dilated && (!call.local || c2 > 10 * tolerance);
            }
        }
        return {steps: count - start, calls: calls};
    }

    // --- cost.py -----------------------------------------------------------------------------------------------

    function rows(guidance) { return guidance === 1 ? 1 : 2; }

    /** What a generation costs; `given` has the names of webui/outline.py's Generation. An Error says why it can't be. */
    function estimate(settings, given) {
        const plan = makePlan(given.base, settings, given.native, given.multiple);
        const own = (value, base) => value === "Same" ? base : value;
        const sampler = own(settings.stage_sampler, given.sampler);
        const levels = noiseLevels(own(settings.stage_scheduler, given.scheduler), sampler,
            settings.stage_steps || given.steps);
        const parts = [], baseArea = plan.base[0] * plan.base[1];
        const hasBase = settings.base_pass || !plan.stages.length || given.from_image;
        let work = 0;
        if (hasBase) {
            const looks = Number(settings.window_prompts && settings.windows && plan.stages.length > 0);
            const calls = given.from_image ? looks
                : rehearse(given.sampler, noiseLevels(given.scheduler, given.sampler, given.steps)).length;
            const unet = calls * rows(given.cfg);
            parts.push({steps: given.from_image ? looks : given.steps, calls: calls, windows: calls, views: 0,
                unet: unet, controlnet: 0});
            work += unet * baseArea;
        }
        for (const stage of plan.stages) {
            const script = makeScript(sampler, levels, settings, given.has_control && hasBase, stage.views,
                plan.stages.length, !hasBase && stage.number === 1);
            const count = name => script.calls.filter(call => call[name]).length;
            const windows = count("local") * stage.windowCount, views = count("dilated") * stage.views;
            let unet = 0, unetViews = 0, controlnet = 0;
            for (const call of script.calls) {
                const both = [settings.local_guidance, settings.dilated_guidance];
                const [local, dilated] = both.map(own => rows(call.guided ? own || given.cfg : 1));
                unet += call.local * stage.windowCount * local;
                unetViews += call.dilated * stage.views * dilated;
                controlnet += call.control * stage.windowCount * local;
            }
            parts.push({steps: script.steps, calls: script.calls.length,
                windows: windows, views: views, unet: unet + unetViews, controlnet: controlnet});
            work += unetViews * stage.viewSize[0] * stage.viewSize[1] +
                (unet + CONTROLNET_COST * controlnet) * stage.window[0] * stage.window[1];
        }
        const calls = TRIALS[given.sampler.toLowerCase()] ? 2 * given.steps - 1 : given.steps;
        return {
            plan: plan, parts: parts, pixels: plan.pixels,
            modelCalls: parts.reduce((sum, part) => sum + part.windows + part.views, 0),
            relative: work / (calls * rows(given.cfg) * baseArea),
        };
    }

    function startOf(denoising) { return Math.min(Math.max(0, round((1 - denoising) * 1e4) / 1e4), 0.95); }

    /** webui/hires.py: what a ticked Hires. fix sets. */
    function hires(width, height, h) {
        let target;
        if (!h.resize_x && !h.resize_y) target = [Math.trunc(width * h.scale), Math.trunc(height * h.scale)];
        else if (!h.resize_y) target = [h.resize_x, Math.floor(h.resize_x * height / width)];
        else if (!h.resize_x) target = [Math.floor(h.resize_y * width / height), h.resize_y];
        else target = [h.resize_x, h.resize_y];
        return {
            target_width: Math.floor(target[0] / CELL) * CELL, target_height: Math.floor(target[1] / CELL) * CELL,
            stage_steps: Math.min(Math.trunc(h.steps / Math.min(Math.max(h.denoising, 0.05), 0.999)), 1000),
            start: startOf(h.denoising),
        };
    }

    function plural(count, what) { return `${count} ${what}${count === 1 ? "" : "s"}`; }

    /** The line under the sizes: "2048x2048: 9 windows + 4 views a step, 1100 model calls, about 22 x a base image". */
    function line(settings, given) {
        const result = estimate(settings, given), stages = result.plan.stages;
        const size = `${result.pixels[1]}x${result.pixels[0]}`;
        if (!stages.length) return {size: size, text: "the base picture's size, so there is nothing to enlarge"};
        const last = stages[stages.length - 1];
        const passes = [];
        if (settings.windows) passes.push(plural(last.windowCount, "window"));
        if (settings.dilated) passes.push(plural(last.views, "view"));
        const relative = result.relative < 10 ? result.relative.toFixed(1) : String(Math.round(result.relative));
        const way = stages.length > 1 ? `${stages.length} stages, the last with ` : "";
        return {size: size, text: `${way}${passes.join(" + ")} per step, ${result.modelCalls} model calls, ` +
            `about ${relative} x a base image`};
    }

    const formulas = {makePlan, noiseLevels, timestep, estimate, hires, line};
    if (typeof module === "object" && module.exports) {
        module.exports = formulas;
        return;
    }

    // --- the panel ---------------------------------------------------------------------------------------------

    if (window.accdiffPanel) return;  // loaded twice
    window.accdiffPanel = formulas;
    const shape = {native: 0, multiple: 0};

    function root() { return typeof gradioApp === "function" ? gradioApp() : document; }

    function element(id) { return root().querySelector(`[id="${id}"]`); }

    /** A control's value by its id, as its type: number, text or true and false; undefined where it isn't there. */
    function value(id) {
        const found = element(id);
        const input = found && (found.querySelector("input[type=radio]:checked") ||
            found.querySelector("input[type=number]") || found.querySelector("input[type=checkbox]") ||
            found.querySelector("input:not([type=radio])") || found.querySelector("select"));
        if (!input) return undefined;
        if (input.type === "checkbox") return input.checked;
        return input.type === "number" ? Number(input.value) : input.value;
    }

    function data(panel) {
        if (!panel.accdiff) panel.accdiff = JSON.parse(panel.querySelector(".accdiff-data").dataset.table);
        return panel.accdiff;
    }

    /** The settings as they stand in the panel. */
    function panelSettings(tab, table) {
        const settings = {};
        for (const [name, option] of Object.entries(table.options)) {
            const now = value(table.prefix + name);
            settings[name] = now === undefined || Number.isNaN(now) ? option.default : now;
        }
        return settings;
    }

    function generation(tab, table, settings) {
        const side = name => value(`${tab}_${name}`) || 0;
        const base = [side("height"), side("width")];
        const model = value(table.prefix + "controlnet_model");
        const likely = Math.max(...base) >= 768 ? [128, 4] : [64, 8];
        return {
            base: base, steps: side("steps") || 20, cfg: side("cfg_scale") || 7,
            sampler: value(`${tab}_sampling`) || "Euler", scheduler: value(`${tab}_scheduler`) || "Automatic",
            native: shape.native || likely[0], multiple: shape.multiple || likely[1],
            has_control: Boolean(model) && model !== "None", from_image: tab === "img2img",
        };
    }

    function hiresControls() {
        const ticked = element("txt2img_hr-checkbox");
        if (!ticked || !ticked.querySelector("input") || !ticked.querySelector("input").checked) return null;
        return {
            scale: value("txt2img_hr_scale"), resize_x: value("txt2img_hr_resize_x") || 0,
            resize_y: value("txt2img_hr_resize_y") || 0,
            steps: value("txt2img_hires_steps") || value("txt2img_steps") || 0,  // as the WebUI has it
            denoising: value("txt2img_denoising_strength"),
        };
    }

    function compute(tab, table) {
        const settings = panelSettings(tab, table), given = generation(tab, table, settings);
        const driver = tab === "txt2img" ? hiresControls() : null;
        if (Boolean(settings.target_width) !== Boolean(settings.target_height) && !driver) {
            throw new Error("give both target width and target height, or 0 for both to use the scale");
        }
        if (!settings.windows && !settings.dilated) throw new Error("windows and dilated are both off");
        if (driver) {
            Object.assign(settings, hires(given.base[1], given.base[0], driver));
            const sampler = value("hr_sampler"), scheduler = value("hr_scheduler");
            const chosen = (own, theirs, same) => own === "Same" && theirs && theirs !== same ? theirs : own;
            settings.stage_sampler = chosen(settings.stage_sampler, sampler, "Use same sampler");
            settings.stage_scheduler = chosen(settings.stage_scheduler, scheduler, "Use same scheduler");
        }
        const denoising = tab === "img2img" ? value("img2img_denoising_strength") : undefined;
        if (denoising !== undefined && settings.start === 0) settings.start = startOf(denoising);
        const result = line(settings, given);
        if (driver) result.text += " (size, steps and start are those of Hires. fix)";
        return result;
    }

    function show(target, size, text, wrong) {
        const key = `${wrong} ${size} ${text}`;
        if (target.dataset.shown === key) return;
        target.dataset.shown = key;
        target.classList.toggle("accdiff-wrong", wrong);
        target.replaceChildren();
        if (size) {
            const bold = document.createElement("b");
            bold.textContent = size;
            target.append(bold, ": ");
        }
        target.append(text);
    }

    function refresh() {
        for (const tab of ["txt2img", "img2img"]) {
            const panel = element(`script_${tab}_accdiffusion_enabled`);
            const target = panel && panel.querySelector(".accdiff-cost");
            if (!target || target.offsetParent === null) continue;  // absent, or folded away
            try {
                const table = data(panel);
                tooltips(panel, table);
                const result = compute(tab, table);
                show(target, result.size, result.text, false);
            } catch (error) {
                show(target, "", error.message, true);
            }
        }
    }

    function tooltips(panel, table) {
        if (panel.dataset.accdiffTooltips) return;
        panel.dataset.accdiffTooltips = "done";
        for (const [name, option] of Object.entries({...table.options, ...table.extra})) {
            const control = element(table.prefix + name);
            if (control && name !== "enabled") control.title = option.help;
        }
    }

    /** The size the loaded checkpoint was trained for: asked once, and again when the checkpoint changes. */
    function askForShape() {
        fetch("accdiffusion/v1/model").then(answer => answer.ok ? answer.json() : null).then(answer => {
            if (answer && answer.native) Object.assign(shape, {native: answer.native, multiple: answer.multiple});
        }).catch(() => {});  // the line then goes by the base picture's size
    }

    function start() {
        if (start.done) return;
        start.done = true;
        askForShape();
        if (typeof onOptionsChanged === "function") onOptionsChanged(askForShape);
        // Values that a preset or "Send to txt2img" sets raise no event in the page, so they are looked at regularly;
        // a folded panel costs two look-ups.
        setInterval(refresh, 300);
    }

    if (typeof onUiLoaded === "function") onUiLoaded(start);
    else window.addEventListener("load", start);
})();
