/* The panel's live line, its tooltips, and which of its controls are shown. What is planned says the server. */
(function () {
    "use strict";

    if (window.accdiffPanel) return;  // loaded twice
    window.accdiffPanel = true;

    /* All in ms. A value that a preset or "Send to txt2img" sets raises no event in the page, so the controls are looked
       at regularly; a folded panel costs two look-ups. */
    const LOOK = 150, SETTLED = 300, PATIENCE = 1000, TIMEOUT = 20000, RETRY = 3000;

    /** Elements of the WebUI's own controls, by the names that a plan has for them. */
    const OWN = {
        both: {width: "width", height: "height", steps: "steps", cfg_scale: "cfg_scale", sampler_name: "sampling",
            scheduler: "scheduler", denoising_strength: "denoising_strength"},
        txt2img: {enable_hr: "txt2img_hr-checkbox", hr_scale: "txt2img_hr_scale", hr_resize_x: "txt2img_hr_resize_x",
            hr_resize_y: "txt2img_hr_resize_y", hr_second_pass_steps: "txt2img_hires_steps",
            hr_sampler_name: "hr_sampler", hr_scheduler: "hr_scheduler"},
        img2img: {},
    };

    const tabs = ["txt2img", "img2img"].map(name => ({name: name, body: "", since: 0, asked: ""}));
    let asking = false;

    function element(id) { return gradioApp().getElementById(id); }

    /** A control's value by its id, as its type: number, text or true and false; null where there is none. */
    function value(id) {
        const found = element(id);
        const input = found && (found.querySelector("input[type=radio]:checked") ||
            found.querySelector("input[type=number]") || found.querySelector("input[type=checkbox]") ||
            found.querySelector("input:not([type=radio])") || found.querySelector("select"));
        if (!input || input.value === "") return null;
        if (input.type === "checkbox") return input.checked;
        return input.type === "number" ? Number(input.value) : input.value;
    }

    /** What the server is asked for: the panel's values as Generate sends them, and what else a plan depends on. */
    function request(tab, table) {
        const asked = {args: table.positional.map(name => name === "enabled" || value(table.prefix + name))};
        for (const [name, id] of Object.entries(OWN.both)) asked[name] = value(`${tab.name}_${id}`);
        for (const [name, id] of Object.entries(OWN[tab.name])) asked[name] = value(id);
        return JSON.stringify({...asked, from_image: tab.name === "img2img"});
    }

    function show(line, size, text, wrong, says) {
        const made = (tag, content) => Object.assign(document.createElement(tag), {textContent: content});
        line.replaceChildren(...(size ? [made("b", size), ": "] : []), text, ...(says || []).map(each => made("p", each)));
        line.classList.toggle("accdiff-wrong", wrong);
    }

    async function ask(tab, line) {
        asking = true;
        tab.asked = tab.body;
        const waiting = setTimeout(() => show(line, "", "asking ...", false), PATIENCE);
        try {
            const answer = await fetch("accdiffusion/v1/plan", {  // relative: the page may be under a path
                method: "POST", headers: {"Content-Type": "application/json", ...tab.table.headers}, credentials: "same-origin",
                body: tab.asked, signal: AbortSignal.timeout?.(TIMEOUT),
            });
            if (!answer.ok && answer.status !== 422) throw new Error(answer.statusText);
            const plan = await answer.json();
            if (answer.ok) show(line, plan.size, plan.text, false, plan.says);
            else show(line, "", plan.detail, true);  // what is wrong with the values
        } catch (error) {
            show(line, "", "no answer from the server", true);
            tab.asked = "";
            tab.since = performance.now() + RETRY;
        } finally {
            clearTimeout(waiting);
            asking = false;
        }
    }

    /** Shows the controls of the options that count: the method has them, and no other option stands in for them. */
    function select(table) {
        const used = ["method", "first_method"].map(name => table.lacks[value(table.prefix + name)]).filter(Boolean);
        const lacks = name => used.length > 0 && used.every(each => each.includes(name));
        const hides = name => name in table.hideable && (lacks(name) ||
            Boolean(table.hideable[name] && value(table.prefix + table.hideable[name])));
        const hide = (name, hidden) => element(table.prefix + name)?.classList.toggle("accdiff-hidden", hidden);
        for (const name of Object.keys(table.hideable)) hide(name, hides(name));
        for (const [name, inside] of Object.entries(table.boxes)) hide(name, inside.every(hides));
        for (const [name, auto] of Object.entries(table.auto)) {
            element(table.prefix + name)?.classList.toggle("accdiff-auto", value(table.prefix + name) === auto);
        }
    }

    function look(tab) {
        const panel = element(`script_${tab.name}_accdiffusion_enabled`);
        const line = panel && panel.querySelector(".accdiff-cost");
        if (!line || line.offsetParent === null) return;  // absent, or folded away
        if (!tab.table) {
            tab.table = JSON.parse(panel.querySelector(".accdiff-data").dataset.table);
            for (const [name, help] of Object.entries(tab.table.help)) {
                element(tab.table.prefix + name)?.setAttribute("title", help);
            }
        }
        select(tab.table);
        const body = request(tab, tab.table), now = performance.now();
        if (body !== tab.body) Object.assign(tab, {body: body, since: now});
        if (body !== tab.asked && now - tab.since >= SETTLED && !asking) ask(tab, line);
    }

    onUiLoaded(() => setInterval(() => tabs.forEach(look), LOOK));
    onOptionsChanged(() => tabs.forEach(tab => { tab.asked = ""; }));  // another checkpoint, say
})();
